"""Fixture of the adapters' tests: tiny models with weights that llama.cpp multiplies exactly."""

from __future__ import annotations

import pytest

from tests.tiny_models import make_tiny


@pytest.fixture(scope="session")
def exact(tmp_path_factory):
    """A function from a model's name to its file with F32 weights, which llama.cpp multiplies exactly."""
    folder = tmp_path_factory.mktemp("exact")

    def path_of(name):
        path = folder / f"{name}.gguf"
        return path if path.exists() else make_tiny(name, path, quant="F32")

    return path_of
