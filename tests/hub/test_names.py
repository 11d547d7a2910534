"""Names of models, and the paths of their files in the cache."""

from __future__ import annotations

from pathlib import Path

import pytest

from worker import hub
from worker.errors import ModelLoadFailed


def test_a_path_is_returned_unchanged(tmp_path: Path) -> None:
    assert hub.resolve("models/a.gguf", tmp_path) == Path("models/a.gguf")
    assert hub.resolve("./smollm2", tmp_path) == Path("smollm2")


def test_an_unknown_name_is_refused_with_the_list_of_models(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadFailed, match=r"no such file or model; expected a .gguf file, smollm2 or hf:"):
        hub.resolve("llama", tmp_path)


@pytest.mark.parametrize("name", ["smollm2", "hf:org/repo/file.gguf"])
def test_a_model_that_is_not_in_the_cache_is_refused_with_the_command_that_pulls_it(name: str, tmp_path: Path) -> None:
    with pytest.raises(ModelLoadFailed, match=f"{name}: the model is not in the cache; expected `worker pull {name}`"):
        hub.resolve(name, tmp_path)


def test_a_split_model_is_in_the_cache_only_with_all_its_parts(tmp_path: Path) -> None:
    folder = tmp_path / "hf" / "org" / "repo" / "Q4"
    folder.mkdir(parents=True)
    name = "hf:org/repo/Q4/m-00002-of-00002.gguf"
    (folder / "m-00002-of-00002.gguf").touch()
    with pytest.raises(ModelLoadFailed, match="not in the cache"):
        hub.resolve(name, tmp_path)
    (folder / "m-00001-of-00002.gguf").touch()
    assert hub.resolve(name, tmp_path) == folder / "m-00002-of-00002.gguf"


@pytest.mark.parametrize(
    "name",
    [
        "hf:",
        "hf:org/file.gguf",
        "hf:org/repo/file.bin",
        "hf:org/repo/../../../file.gguf",
        "hf:org/repo//file.gguf",
        "hf:../repo/file.gguf",
        "hf:org/repo/.gguf",
        "hf:org/repo/file.gguf\n",
        "hf:https://host/org/repo/file.gguf",
    ],
)
def test_a_malformed_hub_name_is_refused_with_the_expected_form(name: str, tmp_path: Path) -> None:
    for use in (hub.resolve, lambda *names: hub.pull(*names, lambda done, total: None)):
        with pytest.raises(ModelLoadFailed, match=r"expected hf:ORG/REPO/FILE.gguf"):
            use(name, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_name_cannot_be_pulled(tmp_path: Path) -> None:
    with pytest.raises(
        ModelLoadFailed, match=r"gpt-5: there is no model of this name.*smollm2 or hf:ORG/REPO/FILE.gguf"
    ):
        hub.pull("gpt-5", tmp_path, lambda done, total: None)
