"""A file by gguf's own writer."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.gguf.written_file import some_tensors, write


@pytest.fixture
def written(tmp_path: Path) -> Path:
    write(tmp_path / "model.gguf", some_tensors())
    return tmp_path / "model.gguf"
