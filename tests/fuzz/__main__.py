"""Fuzz targets one after the other: `python -m tests.fuzz [--runs N] [TARGET …]`.

Each target is a process of its own. An input that is a finding is written to
`regressions/TARGET/`; the exit code is then 1. Fix the defect, and commit the input with the fix.
"""

from __future__ import annotations

import argparse
import re
import resource
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.fuzz.targets import REGRESSIONS, RSS_MB, TARGETS, WALL_S, dictionary, regressions, target


def main() -> int:
    parser = argparse.ArgumentParser(prog="make fuzz", description=__doc__)
    parser.add_argument("targets", nargs="*", metavar="TARGET", default=TARGETS, help=", ".join(TARGETS))
    parser.add_argument("--runs", type=int, default=1_000_000, help="executions of each target, 1,000,000 by default")
    parser.add_argument("--seconds", type=int, default=0, help="end each target after this time; 0 does not")
    parser.add_argument("--seed", type=int, default=0, help="of the fuzzer's random numbers; 0 draws one")
    options = parser.parse_args()
    if unknown := set(options.targets) - set(TARGETS):
        parser.error(f"unknown targets: {', '.join(sorted(unknown))}; choose from {', '.join(TARGETS)}")
    if find_spec("atheris") is None:
        parser.error("atheris is not installed: it has wheels for Linux on x86-64")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # `subprocess.run` ends the target then
    return max(fuzz(name, options.runs, options.seconds, options.seed) for name in options.targets)


def fuzz(name: str, runs: int, seconds: int, seed: int) -> int:
    """Run one target and print its figures; return 1 if there is a finding."""
    module = target(name)
    with TemporaryDirectory() as folder:
        corpus, words = Path(folder) / "corpus", Path(folder) / "words"
        corpus.mkdir()
        for number, data in enumerate([*module.seeds(), *(path.read_bytes() for path in regressions(name))]):
            (corpus / f"{number:04}").write_bytes(data)
        (REGRESSIONS / name).mkdir(parents=True, exist_ok=True)
        options: dict[str, object] = {
            "runs": runs,
            "seed": seed,
            "max_total_time": seconds,
            "timeout": WALL_S,
            "rss_limit_mb": RSS_MB,
            "max_len": 16384,
            "artifact_prefix": f"{REGRESSIONS / name}/",
            "print_final_stats": 1,
            "close_fd_mask": 0,
        }
        if text := dictionary(module):
            words.write_text(text, "latin-1")
            options["dict"] = words
        command = [sys.executable, "-m", "tests.fuzz.engine", name, str(corpus)]
        begun, cpu_begun = time.monotonic(), _children_s()
        done = subprocess.run(
            [*command, *(f"-{key}={value}" for key, value in options.items())], check=False, stderr=subprocess.PIPE
        )
        elapsed, cpu = time.monotonic() - begun, _children_s() - cpu_begun
        report = done.stderr.decode(errors="replace")
        found = dict(re.findall(r"stat::(\w+):\s*(\d+)", report))
        executions, peak = int(found.get("number_of_executed_units", 0)), found.get("peak_rss_mb", "?")
        inputs = len(list(corpus.iterdir()))
    outcome = "no finding" if done.returncode == 0 else "FINDING"
    print(
        f"{name:18} {executions:>9,} executions {elapsed:6.0f} s ({cpu:.0f} s of CPU)"
        f" {peak:>4} MB {inputs:>5} inputs  {outcome}",
        flush=True,
    )
    if done.returncode:
        print(report[-6000:], file=sys.stderr)
    if not any((REGRESSIONS / name).iterdir()):
        (REGRESSIONS / name).rmdir()
    return int(done.returncode != 0)


def _children_s() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    sys.exit(main())
