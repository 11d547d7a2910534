"""Chat templates rendered in a child process, within limits of time and memory.

A template comes with the model file, and runs loops of its own over the texts of a request. What it
may cost is known when it has ended, so it runs where it can be killed: in a process that is started
again for the next request. Read next: template_child.py (the process), chat_template.py (what
rendering is), helper_process.py.
"""

import hashlib
import json
import signal
import threading
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from datetime import datetime
from functools import cached_property
from typing import Any

import msgpack

from worker.errors import Internal, InvalidRequest, ModelLoadFailed
from worker.text.chat import Chat, RenderedChat
from worker.text.helper_process import HelperEnded, HelperProcess
from worker.text.traced_text import TracedText

CPU_S = 2.0
"""CPU time of a request: of the compilation, the trials and the renderings together."""
MEMORY_BYTES = 256 << 20
"""Besides what the process needs before the first request."""
_WALL_S = 20.0
"""For a machine under load; a template can't wait for anything."""
_CODE = "from worker.text.template_child import serve; serve()"


class TemplateProcess:
    """A child process that renders the chats of any number of templates, one at a time.

    It starts with `start` or the first request. Thread-safe.
    """

    def __init__(self, cpu_s: float = CPU_S, memory_bytes: int = MEMORY_BYTES) -> None:
        self._helper = HelperProcess(_CODE, json.dumps([cpu_s, memory_bytes]).encode())
        self._lock = threading.Lock()

    @property
    def pid(self) -> int | None:
        """The child's process id, None if there is none."""
        return self._helper.pid

    def start(self) -> None:
        """Start the child without waiting until it is ready. Idempotent. Raises OSError."""
        with self._lock:
            self._helper.start()

    def stop(self) -> None:
        """End the child; the next request starts another one."""
        with self._lock:
            self._helper.stop()

    def request(self, fields: Mapping[str, Any]) -> list[Any]:
        """Send a request of template_child.py and return the reply: its kind, then its values.

        Kinds of replies that the child does not send: "time" (too much CPU time), and "crash" with
        the exit status. A child that is killed from outside, or has no memory left after earlier
        requests, is replaced by a new one, once. Raises Internal if that one is killed too.
        """
        data = json.dumps(fields, ensure_ascii=False).encode(errors="surrogatepass")
        with self._lock:
            for is_last in (False, True):
                was_used = self._helper.replies > 0
                try:
                    reply = self._helper.request(data, _WALL_S)
                except TimeoutError:
                    return ["time"]
                except HelperEnded as ended:
                    if ended.status in (-signal.SIGPROF, -signal.SIGXCPU):
                        return ["time"]
                    if ended.status != -signal.SIGKILL:
                        return ["crash", ended.status]
                    continue
                values: list[Any] = msgpack.unpackb(reply, unicode_errors="surrogatepass")
                if values[0] != "memory":
                    return values
                self._helper.stop()
                if is_last or not was_used:
                    return values
        raise Internal("the process that renders chat templates was killed twice")


class BoundedTemplate:
    """A template that is compiled and rendered in a child process; see `ChatTemplate`."""

    def __init__(
        self,
        process: TemplateProcess,
        source: str,
        variables: Mapping[str, str],
        special: Iterable[str] = (),
        tool_use: str = "",
    ) -> None:
        self._process = process
        self._definition = {
            "source": source,
            "variables": dict(variables),
            "special": list(special),
            "tool_use": tool_use,
        }

    @cached_property
    def _key(self) -> str:
        """The name of the template in the child process."""
        return hashlib.sha256(json.dumps(self._definition).encode()).hexdigest()

    def start(self) -> None:
        """Start the process without waiting until it is ready. Raises OSError."""
        self._process.start()

    def prepare(self) -> None:
        """Compile the template, which starts the process. Raises ModelLoadFailed if that fails."""
        reply = self._request({})
        if reply[0] != "ok":
            what = _failure(reply) or "it is not usable"
            raise ModelLoadFailed(f"the chat template does not compile: {what}", *_TEMPLATE)

    def render(self, chat: Chat, now: datetime) -> RenderedChat:
        """Return the prompt of a chat; `now`, an aware time, is the template's clock.

        Raises InvalidRequest if the template rejects the chat, fails or exceeds a limit,
        ModelLoadFailed if it does not compile, and RecursionError for a chat that is nested too
        deeply.
        """
        reply = self._request({"chat": asdict(chat), "now": now.isoformat()})
        kind, *values = reply
        if kind == "invalid":
            raise InvalidRequest.of(*map(tuple, values[0]))
        if kind == "recursion":
            raise RecursionError
        if kind != "ok":
            constraint = f"the model's chat template fails on them: {_failure(reply)}"
            raise InvalidRequest.of(("messages", constraint, None))
        text, origin, requested = values[1:]
        return RenderedChat(TracedText(text, origin), requested)

    def _request(self, fields: Mapping[str, Any]) -> list[Any]:
        request = {"template": self._key, **fields}
        reply = self._process.request(request)
        if reply[:2] == ["ok", "unknown"]:
            reply = self._process.request({**request, "definition": self._definition})
        if reply[0] == "unusable":
            raise ModelLoadFailed(*reply[1])
        return reply


_TEMPLATE = ("tokenizer.chat_template", "a Jinja2 template")


def _failure(reply: list[Any]) -> str:
    """A sentence for a reply without a result."""
    match reply:
        case ["time"]:
            return f"it takes more than {CPU_S:g} s"
        case ["memory"]:
            return f"it takes more than {MEMORY_BYTES >> 20} MB"
        case ["recursion"]:
            return "it is nested too deeply"
        case ["crash", status]:
            return f"it ends the process that renders it (exit status {status})"
        case _:
            return str(reply[1])
