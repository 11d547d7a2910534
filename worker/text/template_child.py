"""The child process of template_process.py: renders chat templates within its limits.

The kernel ends the process with SIGPROF when a request has used its CPU time, whatever library call
that time is spent in. Too much memory is a MemoryError of the request.
"""

import contextlib
import json
import signal
import struct
import sys
from collections.abc import Callable, Iterator
from datetime import datetime
from typing import Any

import msgpack

from worker.errors import InvalidRequest, ModelLoadFailed
from worker.text.chat import Chat
from worker.text.chat_template import ChatTemplate

_LENGTH = struct.Struct("<q")


def serve() -> None:
    """Answer requests of the parent process until it closes the standard input."""
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    receive = _messages()
    cpu_s, memory_bytes = json.loads(next(receive))
    _limit_memory(memory_bytes)
    _send(b"")
    templates: dict[str, ChatTemplate] = {}
    for message in receive:
        signal.setitimer(signal.ITIMER_PROF, cpu_s)
        reply = _answered(lambda message=message: _answer(templates, message))  # type: ignore[misc]
        signal.setitimer(signal.ITIMER_PROF, 0)
        _send(reply)


def _messages() -> Iterator[bytes]:
    stdin = sys.stdin.buffer
    while len(header := stdin.read(_LENGTH.size)) == _LENGTH.size:
        yield stdin.read(_LENGTH.unpack(header)[0])


def _send(data: bytes) -> None:
    sys.stdout.buffer.write(_LENGTH.pack(len(data)) + data)
    sys.stdout.buffer.flush()


def _limit_memory(memory_bytes: int) -> None:
    """Limit the address space of the process to its present size plus `memory_bytes`."""
    with contextlib.suppress(OSError), open("/proc/self/statm") as file:  # elsewhere the time alone is limited
        import resource  # noqa: PLC0415  # not on every system

        limit = int(file.read().split()[0]) * resource.getpagesize() + memory_bytes
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _answered(answer: Callable[[], tuple[Any, ...]]) -> bytes:
    """The encoded result of `answer`, or the kind of its exception and what describes it."""
    try:
        return _encoded("ok", *answer())
    except InvalidRequest as error:
        return _encoded("invalid", [tuple(each.values()) for each in error.details["errors"]])
    except ModelLoadFailed as error:
        return _encoded("unusable", [error.details[name] for name in ("what", "where", "expected")])
    except MemoryError:
        return _encoded("memory")
    except RecursionError:
        return _encoded("recursion")
    except BaseException as error:  # also a panic of a native library
        return _encoded("failed", f"{type(error).__name__}: {str(error)[:300]}")


def _encoded(*values: Any) -> bytes:
    data: bytes = msgpack.packb(values, unicode_errors="surrogatepass")
    return data


def _answer(templates: dict[str, ChatTemplate], message: bytes) -> tuple[Any, ...]:
    """Compile a template, or render a chat: text, origins, and texts of the request if needed.

    The result is ("unknown",) for a template that this process has not compiled.
    """
    request = json.loads(message.decode(errors="surrogatepass"))
    key, chat = request["template"], request.get("chat")
    if (definition := request.get("definition")) is not None:
        templates[key] = ChatTemplate(**definition)
    if key not in templates:
        return ("unknown",)
    if chat is None:
        templates[key].prepare()
        return ("compiled",)
    rendered = templates[key].render(Chat(**chat), datetime.fromisoformat(request["now"]))
    return "rendered", str.__str__(rendered.text), rendered.text._origin, list(rendered.requested)
