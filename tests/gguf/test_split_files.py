"""A model split into shards opens as one, from any shard, and only when all shards fit together."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFWriter

from tests.gguf.raw_file import METADATA, raw_file
from tests.gguf.written_file import some_tensors, write
from worker.errors import ModelLoadFailed
from worker.gguf_file import GgufFile, shard_paths


@pytest.fixture
def shards(tmp_path: Path) -> list[Path]:
    write(tmp_path / "model.gguf", some_tensors(), split_max_tensors=8)
    return sorted(tmp_path.glob("*.gguf"))


def test_any_shard_opens_the_whole_split_model(shards: list[Path], tmp_path: Path) -> None:
    assert [path.name for path in shards] == [f"model-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
    write(tmp_path / "whole", some_tensors())
    with GgufFile.open(tmp_path / "whole") as whole:
        for path in shards:
            with GgufFile.open(path) as file:
                assert file.architecture == "llama"
                assert file.tensor_bytes == whole.tensor_bytes
                assert {tensor.shard for tensor in file.tensors.values()} == {0, 1, 2}
                for name, tensor in file.tensors.items():
                    assert file.data(tensor).tobytes() == whole.data(whole.tensors[name]).tobytes()


def test_a_missing_shard_is_named(shards: list[Path]) -> None:
    shards[1].unlink()
    with pytest.raises(ModelLoadFailed, match=r"model-00002-of-00003.gguf: the file can't be opened"):
        GgufFile.open(shards[2])


def test_a_shard_under_another_shard_s_name_is_refused(shards: list[Path]) -> None:
    shutil.copy(shards[2], shards[1])
    with pytest.raises(ModelLoadFailed, match=r"00002-of-00003.gguf: split.no and split.count are 2 and 3"):
        GgufFile.open(shards[0])


def test_a_shard_under_a_name_of_its_own_is_refused(shards: list[Path], tmp_path: Path) -> None:
    for number, path in enumerate(shards):
        moved = path.rename(tmp_path / "renamed.gguf")
        with pytest.raises(ModelLoadFailed, match=rf"split.no and split.count are {number} and 3, and the file name"):
            GgufFile.open(moved)


def test_a_whole_file_under_a_shard_s_name_is_refused(written: Path) -> None:
    moved = written.rename(written.with_name("model-00001-of-00002.gguf"))
    shutil.copy(moved, written.with_name("model-00002-of-00002.gguf"))
    with pytest.raises(ModelLoadFailed, match=r"split.count are 0 and 1, and the file name is that of shard 0 of 2"):
        GgufFile.open(moved)


def test_one_shard_of_one_is_a_whole_file(written: Path) -> None:
    GgufFile.open(written.rename(written.with_name("model-00001-of-00001.gguf"))).close()


@pytest.mark.parametrize("name", ["m-00000-of-00002.gguf", "m-00003-of-00002.gguf", "m-00001-of-10000.gguf"])
def test_an_impossible_shard_number_is_refused(name: str) -> None:
    with pytest.raises(ModelLoadFailed, match="not that of a shard"):
        shard_paths(Path(name))


def test_shards_that_repeat_a_tensor_are_refused(tmp_path: Path) -> None:
    write_shards(tmp_path, [["a", "b"], ["a"]], claimed=3)
    with pytest.raises(ModelLoadFailed, match=r"tensor 'a' is in m-00001-of-00002.gguf too"):
        GgufFile.open(tmp_path / "m-00001-of-00002.gguf")


def test_shards_with_fewer_tensors_than_promised_are_refused(tmp_path: Path) -> None:
    write_shards(tmp_path, [["a", "b"], ["c"]], claimed=4)
    with pytest.raises(ModelLoadFailed, match=r"3 tensors together; expected 4, the value of split.tensors.count"):
        GgufFile.open(tmp_path / "m-00001-of-00002.gguf")


def test_a_split_count_that_is_no_number_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(raw_file(metadata=[*METADATA, ("split.count", 9, (4, [1, 2]))]).data)
    with pytest.raises(ModelLoadFailed, match=r"'split.count' is of type ndarray; expected type int"):
        GgufFile.open(path)


def write_shards(folder: Path, names: list[list[str]], claimed: int) -> None:
    for number, tensors in enumerate(names):
        writer = GGUFWriter(folder / f"m-{number + 1:05d}-of-{len(names):05d}.gguf", "llama")
        writer.add_uint16("split.no", number)
        writer.add_uint16("split.count", len(names))
        writer.add_int32("split.tensors.count", claimed)
        for name in tensors:
            writer.add_tensor(name, np.ones(4, np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
