"""A fake Python executable that replaces pip and huggingface_hub: no test uses the network."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

PRELUDE = """#!{python}
import os, shutil, sys, time
from pathlib import Path
here = Path(__file__).parent
with (here / "runs").open("a") as runs:
    runs.write(" ".join(sys.argv[1:]) + "\\n")

def wait_for(name):
    for _ in range(2000):
        if (here / name).exists():
            return
        time.sleep(0.01)
    sys.exit("timeout: no file " + name)

"""


class FakePython:
    """A script in place of `sys.executable`; `runs` lists the command lines it was started with."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self._real = sys.executable
        self._script = folder / "python"
        monkeypatch.setattr(sys, "executable", str(self._script))
        self.set_script("sys.exit('unexpected call')")

    def set_script(self, script: str) -> None:
        self._script.write_text(PRELUDE.format(python=self._real) + script)
        self._script.chmod(0o755)

    @property
    def runs(self) -> list[str]:
        runs = self.folder / "runs"
        return runs.read_text().splitlines() if runs.exists() else []

    def resume_at(self, wanted: int, seen: list[tuple[int, int]]) -> Callable[[int, int], None]:
        """Return a progress callback that fills `seen` and resumes the script at `wanted` bytes."""

        def progress(done: int, total: int) -> None:
            seen.append((done, total))
            if done == wanted:
                (self.folder / "go").touch()

        return progress
