"""A file of a Hugging Face repository: a child process downloads all parts of a split model."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest

from tests.hub.fake_python import FakePython
from worker import hub
from worker.errors import ModelLoadFailed

HF = """
folder, files = Path(sys.argv[4]), sys.argv[5:]
print(100 * len(files), flush=True)
for file in files:
    (folder / file).parent.mkdir(parents=True, exist_ok=True)
    {before}
    (folder / file).write_bytes(b"x" * 100)
"""
PARTIAL_DOWNLOAD = """
    part = folder / ".cache" / "huggingface" / "download" / "abc.incomplete"
    part.parent.mkdir(parents=True, exist_ok=True)
    part.write_bytes(b"x" * 40)
    wait_for("go")
    part.unlink()
"""


def no_progress(done: int, total: int) -> None:
    pass


def test_a_pull_downloads_the_file_once(python: FakePython, tmp_path: Path) -> None:
    python.set_script(HF.format(before=""))
    path = hub.pull("hf:org/repo/file.gguf", tmp_path, no_progress)
    assert path == hub.resolve("hf:org/repo/file.gguf", tmp_path) == tmp_path / "hf" / "org" / "repo" / "file.gguf"
    assert hub.pull("hf:org/repo/file.gguf", tmp_path, no_progress) == path
    assert python.runs == [f"-m worker.hub org/repo {path.parent} file.gguf"]


def test_all_parts_of_a_split_model_are_downloaded(python: FakePython, tmp_path: Path) -> None:
    python.set_script(HF.format(before=""))
    path = hub.pull("hf:org/repo/Q4/m-00002-of-00003.gguf", tmp_path, no_progress)
    assert path.name == "m-00002-of-00003.gguf"
    assert sorted(p.name for p in path.parent.iterdir()) == [f"m-0000{i}-of-00003.gguf" for i in (1, 2, 3)]


def test_progress_grows_while_a_part_downloads(python: FakePython, tmp_path: Path) -> None:
    python.set_script(HF.format(before=PARTIAL_DOWNLOAD))
    seen: list[tuple[int, int]] = []
    hub.pull("hf:org/repo/m-00001-of-00002.gguf", tmp_path, python.resume_at(40, seen))
    assert (40, 200) in seen
    assert seen[-1] == (200, 200)


@pytest.mark.parametrize(
    ("output", "what"),
    [
        ("GatedRepoError: 403 Client Error", "the repository's terms are not accepted"),
        ("RepositoryNotFoundError: 401 Client Error", "there is no such repository"),
        ("RemoteEntryNotFoundError: 404 Client Error", "the repository has no such file"),
        ("EntryNotFoundError: 404 Client Error", "the repository has no such file"),
        ("LocalEntryNotFoundError: An error happened", "the network can't be reached"),
        ("ConnectError: [Errno -2] Name or service not known", "the network can't be reached"),
        ("OSError: [Errno 28] No space left on device", "the disk is full"),
        ("ValueError: out of luck", "the download failed: ValueError: out of luck"),
    ],
)
def test_a_failure_of_the_hub_is_reported_in_one_sentence(
    python: FakePython, tmp_path: Path, output: str, what: str
) -> None:
    python.set_script(f"sys.exit({output!r})")
    with pytest.raises(ModelLoadFailed) as caught:
        hub.pull("hf:org/repo/file.gguf", tmp_path, no_progress)
    assert caught.value.details["what"] == what
    assert not (tmp_path / "hf" / "org" / "repo" / "file.gguf").exists()


def test_the_child_process_prints_the_total_bytes_and_then_downloads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    downloaded: list[tuple[Any, ...]] = []
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", lambda url: SimpleNamespace(size=len(url)))
    monkeypatch.setattr(huggingface_hub, "hf_hub_url", lambda repo, file: f"{repo}/{file}")
    monkeypatch.setattr(
        huggingface_hub, "hf_hub_download", lambda repo, file, local_dir: downloaded.append((repo, file, local_dir))
    )
    hub._download_from_hf("org/repo", str(tmp_path), "a.gguf", "b.gguf")
    assert downloaded == [("org/repo", "a.gguf", str(tmp_path)), ("org/repo", "b.gguf", str(tmp_path))]
    assert capsys.readouterr().out == f"{2 * len('org/repo/a.gguf')}\n"


def test_the_child_process_exits_with_the_type_and_message_of_its_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise ConnectionError("no route to host")

    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", refuse)
    with pytest.raises(SystemExit, match="ConnectionError: no route to host"):
        hub._download_from_hf("org/repo", "folder", "a.gguf")
