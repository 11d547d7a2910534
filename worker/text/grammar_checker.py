"""A child process that compiles grammars first, within limits of time and memory.

llguidance can't be interrupted, and some grammars of a few bytes take it minutes or gigabytes. The
child is killed in such a case. It lives as long as its parent keeps its standard input open.
"""

import contextlib
import json
import os
import select
import struct
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Mapping
from typing import Any

from worker.text.vocabulary import CONTROL, Vocabulary

TIMEOUT_S = 2.0
MEMORY_BYTES = 256 << 20
TOO_MUCH = "it takes more than"
"""How the errors for exceeded limits begin."""
_START_S = 30.0
"""For the start of the interpreter, on a machine under load."""

_LENGTH = struct.Struct("<q")
_CHILD = """
import json, struct, sys
from llguidance import LLMatcher, LLParserLimits, LLTokenizer
stdin, stdout = sys.stdin.buffer, sys.stdout.buffer

def read():
    header = stdin.read(8)
    return stdin.read(struct.unpack("<q", header)[0]).decode() if len(header) == 8 else None

def write(value):
    data = json.dumps(value).encode()
    stdout.write(struct.pack("<q", len(data)) + data)
    stdout.flush()

def kilobytes(key):
    try:
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) for line in file if line.startswith(key))
    except OSError:  # not Linux: the time alone is bounded
        return 0

memory, limits, size, special, ends = json.loads(read())

class Bytes:
    is_tokenizer_wrapper, bos_token_id, special_token_ids = True, None, ()
    eos_token_id = ends[0]
    tokens = [b""] * size
    def __call__(self, text):
        return []

for token_id in special:
    Bytes.tokens[token_id] = bytes([255]) + str(token_id).encode()
free = (token_id for token_id, token in enumerate(Bytes.tokens) if not token)
for byte, token_id in zip(range(255), list(free)):
    Bytes.tokens[token_id] = bytes([byte])
limits = LLParserLimits(**limits)
tokenizer = LLTokenizer(Bytes(), eos_token=ends, slices=[])
if mapped := kilobytes("VmSize:"):
    import resource
    resource.setrlimit(resource.RLIMIT_AS, (1024 * mapped + memory,) * 2)
write(["", 0])
while source := read():
    if mapped:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # resets the peak
    before = kilobytes("VmRSS:")
    error = LLMatcher(tokenizer, source, log_level=0, limits=limits).get_error()
    write([error, 1024 * max(0, kilobytes("VmHWM:") - before)])
"""


class GrammarChecker:
    """Compiles one grammar at a time in a child process, which starts with `start` or the first.

    The child's vocabulary has the bytes and the special tokens of the given one: what a grammar
    costs to compile does not depend on the other tokens.
    """

    def __init__(self, vocab: Vocabulary, limits: Mapping[str, Any]) -> None:
        """`limits` are keyword arguments of LLParserLimits."""
        self._vocab = vocab
        self._parser_limits = dict(limits)
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._is_ready = False
        self._stop: weakref.finalize[..., GrammarChecker] | None = None

    def start(self) -> None:
        """Start the child process, without waiting until it is ready. Idempotent.

        If it can't be started, `check` reports that.
        """
        with self._lock, contextlib.suppress(OSError):
            self._started()

    def check(self, source: str) -> tuple[str, int]:
        """Compile; return the error, "" if the grammar is within the limits, and the bytes used."""
        with self._lock:
            process = self._running()
            try:
                deadline = time.monotonic() + TIMEOUT_S
                _write(process, source)
                error, peak = json.loads(_read(process, deadline))
                return str(error), int(peak)
            except TimeoutError:
                self._kill()
                return f"{TOO_MUCH} {TIMEOUT_S:g} s to compile", 0
            except (EOFError, BrokenPipeError):
                self._kill()
                return f"{TOO_MUCH} {MEMORY_BYTES >> 20} MB to compile", 0

    def _started(self) -> "subprocess.Popen[bytes]":
        if self._process is not None and self._process.poll() is None:
            return self._process
        self._kill()
        process = subprocess.Popen(
            [sys.executable, "-P", "-c", _CHILD],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C in a terminal is the worker's
        )
        self._process, self._stop = process, weakref.finalize(self, _end, process)
        vocab = self._vocab
        special = vocab.end_ids.union(i for i, kind in enumerate(vocab.types) if kind == CONTROL)
        _write(process, json.dumps([MEMORY_BYTES, self._parser_limits, vocab.size, [*special], [*vocab.end_ids]]))
        return process

    def _running(self) -> "subprocess.Popen[bytes]":
        """The child process, ready for a grammar. Raises OSError if it does not start."""
        try:
            process = self._started()
            if not self._is_ready:
                _read(process, time.monotonic() + _START_S)
        except (TimeoutError, EOFError, BrokenPipeError):
            self._kill()
            raise OSError("the process that checks grammars does not start") from None
        self._is_ready = True
        return process

    def _kill(self) -> None:
        if self._stop is not None:
            self._stop()
        self._process = self._stop = None
        self._is_ready = False


def _end(process: "subprocess.Popen[bytes]") -> None:
    process.kill()
    process.wait()
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            try:
                stream.close()
            except BrokenPipeError:  # a grammar that was not written completely
                continue


def _write(process: "subprocess.Popen[bytes]", text: str) -> None:
    assert process.stdin is not None
    data = text.encode()
    process.stdin.write(_LENGTH.pack(len(data)) + data)
    process.stdin.flush()


def _read(process: "subprocess.Popen[bytes]", deadline: float) -> str:
    """Read a reply. Raises TimeoutError, and EOFError if the process has ended."""
    assert process.stdout is not None
    file, data = process.stdout.fileno(), b""
    size = _LENGTH.size
    while len(data) < size:
        left = deadline - time.monotonic()
        if left <= 0 or not select.select([file], [], [], left)[0]:
            raise TimeoutError
        part = os.read(file, size - len(data))
        if not part:
            raise EOFError
        data += part
        if len(data) == _LENGTH.size == size:
            size += _LENGTH.unpack(data)[0]
    return data[_LENGTH.size :].decode(errors="replace")
