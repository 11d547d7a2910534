"""`worker top` in a real terminal of 80 × 24 characters, as tmux shows it."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.jobs.servers import Server, running_server
from tests.service.processes import workers
from worker.jobs.client import SyncClient

pytestmark = pytest.mark.skipif(shutil.which("tmux") is None, reason="tmux is not installed")
ROOT = Path(__file__).parents[3]
JOBS = 1000
OFTEN = {"WORKER_SERVICE__HEARTBEAT_S": "0.3", "WORKER_LEASE__LEASE_S": "60"}


class Terminal:
    """A tmux server of its own with one window, in which a shell runs."""

    def __init__(self, folder: Path, width: int = 80, height: int = 24) -> None:
        self._tmux = ["tmux", "-S", str(folder / "tmux"), "-f", "/dev/null"]
        size = ("-x", str(width), "-y", str(height))
        environment = {**os.environ, "TERM": "xterm-256color", "PYTHONPATH": str(ROOT)}
        environment.pop("NO_COLOR", None)
        command = [*self._tmux, "new-session", "-d", *size, "-c", str(ROOT), "sh"]
        subprocess.run(command, env=environment, check=True, timeout=30)
        self._run("send-keys", "-l", "PS1='prompt> '; clear")
        self.press("Enter")

    def _run(self, *arguments: str) -> str:
        done = subprocess.run([*self._tmux, *arguments], capture_output=True, text=True, check=True, timeout=30)
        return done.stdout

    def press(self, *keys: str) -> None:
        self._run("send-keys", *keys)

    def type(self, *words: object) -> None:
        self._run("send-keys", "-l", shlex.join(map(str, words)))
        self.press("Enter")

    def resize(self, width: int, height: int) -> None:
        self._run("resize-window", "-x", str(width), "-y", str(height))

    def lines(self, *, escapes: bool = False) -> list[str]:
        return self._run("capture-pane", "-p", *(["-e"] if escapes else [])).splitlines()

    def format(self, name: str) -> str:
        return self._run("display-message", "-p", f"#{{{name}}}").strip()

    def wait_for(self, *texts: str, timeout_s: float = 60.0) -> str:
        """Wait for a line that has all texts; return it."""
        return self.wait_until(
            lambda: next((line for line in self.lines() if all(text in line for text in texts)), None),
            str(texts),
            timeout_s,
        )

    def wait_until(self, find: Callable[[], str | None], what: str, timeout_s: float = 60.0) -> str:
        deadline = time.monotonic() + timeout_s
        while (found := find()) is None:
            assert time.monotonic() < deadline, f"no {what}:\n" + "\n".join(self.lines())
            time.sleep(0.1)
        return found

    def close(self) -> None:
        with contextlib.suppress(subprocess.CalledProcessError):
            self._run("kill-server")


@pytest.fixture
def terminal(tmp_path: Path) -> Iterator[Terminal]:
    opened = Terminal(tmp_path)
    yield opened
    opened.close()


@pytest.fixture
def server() -> Iterator[Server]:
    with running_server() as started:
        yield started


def start(terminal: Terminal, server: Server, *words: str, environment: tuple[str, ...] = ()) -> None:
    terminal.wait_for("prompt>")
    terminal.type(
        "env",
        *environment,
        sys.executable,
        "-m",
        "worker",
        "top",
        "--redis-url",
        server.url,
        "--interval",
        0.25,
        *words,
    )
    terminal.wait_for("q Quit")


def assert_restored(terminal: Terminal, code: int) -> None:
    """The shell is back: echo, cursor and main screen as before."""
    terminal.wait_for("prompt>")
    terminal._run("send-keys", "-l", "echo exit=$?")
    terminal.press("Enter")
    terminal.wait_for(f"exit={code}")
    assert [terminal.format(name) for name in ("alternate_on", "cursor_flag", "mouse_any_flag")] == ["0", "1", "0"]
    terminal.type("echo", "visible")
    terminal.wait_for("echo visible"), "what is typed is echoed"


def test_1000_jobs_a_death_a_restart_and_a_resize_at_80_by_24(
    server: Server, terminal: Terminal, tmp_path: Path
) -> None:
    echo = ("--echo", "--echo-step-ms", 20, "--max-running", 4)
    with (
        workers(server.url, tmp_path, (*echo, "--name", "gpu-0"), (*echo, "--name", "gpu-1"), **OFTEN) as (first, _),
        SyncClient.from_url(server.url) as client,
    ):
        for number in range(JOBS):
            client.submit(job_id=f"job-{number}", prompt="abcd" * 5, max_tokens=8000)
        start(terminal, server)
        terminal.wait_for("1 Jobs 1,000 ")
        busy = terminal.wait_for("gpu-0", "busy", "4/4")
        assert re.fullmatch(r"gpu-0-\S+ +busy +echo +4/4 +\d+ +[\d.]+m?s +[\d.]+m?s +\d+% -", busy.strip())
        shown = terminal.lines()
        assert len(shown) == 24
        assert re.match(rf" worker top  \d\d:\d\d:\d\d  2 workers, \d+ tokens/s  {server.url}$", shown[0])
        assert shown[1].split() == ["QUEUE", "WAITING", "RUNNING", "OLDEST", "DEAD"]
        assert re.fullmatch(r"default +992 +8 +\S+ +0", shown[2].strip())
        assert shown[-1] == "enter Details q Quit ? Help d Drain worker c Cancel job r Retry letter"
        listed = [line.split() for line in shown[8:-1]]
        assert [words[0] for words in listed] == [f"job-{n}" for n in range(len(listed))]
        assert [words[1] for words in listed] == ["running"] * 8 + ["waiting"] * (len(listed) - 8)
        assert len(listed) == 15

        terminal.press("1", "End")
        terminal.wait_for("job-999 ", "waiting")
        terminal.press("c")
        terminal.wait_for("Cancel the waiting job job-999?")
        terminal.press("y")
        terminal.wait_for("job-999 was cancelled")
        assert client.state("job-999")["error"] == "CANCELLED"

        first.send(signal.SIGKILL)
        terminal.wait_for("gpu-0", "stale")
        server.stop()
        terminal.wait_for("server unreachable since")
        server.start()
        terminal.wait_for("1 worker", "tokens/s")
        terminal.wait_for("gpu-1", "ready")
        assert not any("unreachable" in line for line in terminal.lines())

        for width, height in ((140, 50), (40, 10), (80, 24)):
            terminal.resize(width, height)
            terminal.wait_until(
                lambda w=width, h=height: "" if len(s := terminal.lines()) == h and max(map(len, s)) > w - 10 else None,
                f"view of {width} × {height}",
            )
        terminal.press("q")
        assert_restored(terminal, 0)


def test_ctrl_c_and_sigterm_restore_the_terminal(server: Server, terminal: Terminal) -> None:
    start(terminal, server)
    terminal.press("?")
    terminal.wait_for("orphaned")
    terminal.press("C-c")
    assert_restored(terminal, 130)
    terminal.type("clear")
    start(terminal, server)
    pane = int(terminal.format("pane_pid"))
    children = subprocess.run(["ps", "--ppid", str(pane), "-o", "pid="], capture_output=True, text=True, check=True)
    os.kill(int(children.stdout.split()[0]), signal.SIGTERM)
    assert_restored(terminal, 143)


@pytest.mark.parametrize("setting", [("LC_ALL=C",), ()])
def test_an_ascii_terminal_gets_ascii_and_no_color_no_colors(
    server: Server, terminal: Terminal, setting: tuple[str, ...], tmp_path: Path
) -> None:
    with workers(server.url, tmp_path, ("--echo", "--name", "a-very-long-name-of-a-worker")):
        start(terminal, server, *([] if setting else ["--ascii"]), environment=(*setting, "NO_COLOR=1"))
        terminal.wait_for("a-very", "ready")
        terminal.press("d")
        terminal.wait_for("+- Drain -")
        text = "\n".join(terminal.lines(escapes=True))
        assert text.isascii()
        colors = {code for codes in re.findall(r"\x1b\[([\d;:]*)m", text) for code in re.split("[;:]", codes)}
        assert colors <= {"", *"0123457", "39", "49"}, "only attributes and the default colors"
        terminal.press("n", "q")
        assert_restored(terminal, 0)
