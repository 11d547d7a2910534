"""A child process that compiles grammars first, within limits of time and memory.

llguidance can't be interrupted, and some grammars of a few bytes take it minutes or gigabytes. The
child is killed in such a case. It lives as long as its parent keeps its standard input open.
"""

import contextlib
import json
import signal
import threading
from collections.abc import Mapping
from typing import Any

from worker.text.helper_process import HelperEnded, HelperProcess
from worker.text.vocabulary import CONTROL, Vocabulary

TIMEOUT_S = 2.0
MEMORY_BYTES = 256 << 20
TOO_MUCH = "it takes more than"
"""How the errors for exceeded limits begin."""

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
        special = vocab.end_ids.union(i for i, kind in enumerate(vocab.types) if kind == CONTROL)
        first = [MEMORY_BYTES, dict(limits), vocab.size, [*special], [*vocab.end_ids]]
        self._helper = HelperProcess(_CHILD, json.dumps(first).encode())
        self._lock = threading.Lock()

    @property
    def pid(self) -> int | None:
        """The child's process id, None if there is none."""
        return self._helper.pid

    def start(self) -> None:
        """Start the child process, without waiting until it is ready. Idempotent.

        If it can't be started, `check` reports that.
        """
        with self._lock, contextlib.suppress(OSError):
            self._helper.start()

    def check(self, source: str) -> tuple[str, int]:
        """Compile; return the error, "" if the grammar is within the limits, and the bytes used.

        Raises OSError if the child does not start, or is killed twice from outside.
        """
        data = source.encode()
        with self._lock:
            for _ in range(2):
                try:
                    error, peak = json.loads(self._helper.request(data, TIMEOUT_S))
                    return str(error), int(peak)
                except TimeoutError:
                    return f"{TOO_MUCH} {TIMEOUT_S:g} s to compile", 0
                except HelperEnded as ended:
                    if ended.status != -signal.SIGKILL:
                        return f"{TOO_MUCH} {MEMORY_BYTES >> 20} MB to compile", 0
        raise OSError("the process that checks grammars was killed twice")
