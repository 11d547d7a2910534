"""Wall clocks of processes that can be set while they run, by a preloaded library (`clock.c`)."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

SOURCE = Path(__file__).with_name("clock.c")


class Clock:
    """The wall clock of processes that are started with the prefix `command`."""

    def __init__(self, library: Path | None, file: Path) -> None:
        self._file = file
        self.ahead_s = 0
        self.set(0)
        self.command: list[str | Path] = []
        """Words to put before a command; empty without a library, and the clock cannot be set then."""
        env = shutil.which("env")
        if library is not None and env is not None:
            self.command = [env, f"LD_PRELOAD={library}", f"CHAOS_CLOCK={file}"]

    def set(self, ahead_s: int) -> None:
        """Set the clock to the machine's plus `ahead_s` seconds."""
        self.ahead_s = ahead_s
        with self._file.open("r+b" if self._file.exists() else "wb") as file:  # mapped: must not be replaced
            file.write(ahead_s.to_bytes(8, "little", signed=True))


def build_library(folder: Path) -> Path | None:
    """Compile `clock.c` into `folder`; None without a C compiler."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        return None
    library = folder / "clock.so"
    command = [compiler, "-shared", "-fPIC", "-O1", "-Wall", "-Werror", str(SOURCE), "-o", str(library), "-ldl"]
    subprocess.run(command, check=True, timeout=60)
    return library
