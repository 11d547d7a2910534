"""Fixtures: the fake Python, and a small packaged model beside the published one."""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path

import pytest

from tests.hub.fake_python import FakePython
from worker import hub

CONTENT = bytes(range(256)) * 10_000


@pytest.fixture
def python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakePython:
    (tmp_path / "bin").mkdir()
    return FakePython(tmp_path / "bin", monkeypatch)


@pytest.fixture
def wheel(python: FakePython) -> Path:
    """The wheel of `small` as a package index serves it."""
    path = python.folder / "small-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("small/model.gguf", CONTENT)
    return path


@pytest.fixture
def small(wheel: Path, monkeypatch: pytest.MonkeyPatch) -> hub.PackagedModel:
    model = hub.PackagedModel(
        name="small",
        requirement="small==1.0",
        wheel=wheel.name,
        wheel_bytes=wheel.stat().st_size,
        member="small/model.gguf",
        size=len(CONTENT),
        sha256=hashlib.sha256(CONTENT).hexdigest(),
    )
    monkeypatch.setitem(hub.PACKAGED, "small", model)
    return model
