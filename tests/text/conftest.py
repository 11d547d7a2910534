"""Vocabularies of real models: compressed GGUF files without tensors, in tests/data/vocab."""

import lzma
from pathlib import Path

import pytest

from worker.gguf_file import GgufFile
from worker.text.tokenizer import Tokenizer, load_tokenizer

VOCABULARIES = Path(__file__).parent.parent / "data" / "vocab"


@pytest.fixture(scope="session")
def metadata_of(tmp_path_factory):
    """A function that returns the metadata of a vocabulary by name."""
    folder, read = tmp_path_factory.mktemp("vocab"), {}

    def metadata(name: str) -> dict:
        if name not in read:
            path = folder / f"{name}.gguf"
            path.write_bytes(lzma.decompress((VOCABULARIES / f"{name}.gguf.xz").read_bytes()))
            with GgufFile.open(path) as file:
                read[name] = dict(file.metadata)
        return read[name]

    return metadata


@pytest.fixture(scope="session")
def qwen2(metadata_of) -> Tokenizer:
    return load_tokenizer(metadata_of("qwen2"))


@pytest.fixture(scope="session")
def phi3(metadata_of) -> Tokenizer:
    return load_tokenizer(metadata_of("phi-3"))


@pytest.fixture(scope="session")
def gpt_oss(metadata_of) -> Tokenizer:
    return load_tokenizer(metadata_of("gpt-oss"))
