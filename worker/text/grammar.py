"""Grammars of answers, compiled with llguidance, and the masks of sequences (`worker/sampling.py`).

A mask is a function of the grammar and the accepted ids alone: another worker, other sequences and
the time do not matter. Every failure of the library is an InvalidRequest of one job, since a
failed matcher would allow the end token alone. Read next: answer_grammar.py (what is compiled),
grammar_checker.py (limits of time and memory), grammar_vocabulary.py.
"""

from __future__ import annotations

import re
import threading
import time
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from worker.errors import InvalidRequest, as_exception
from worker.text.grammar_checker import TOO_MUCH, GrammarChecker
from worker.text.grammar_vocabulary import library_tokenizer
from worker.text.json_schema import locate, schema_source
from worker.text.lark import OPTIONS

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer
    from numpy.typing import NDArray

    from worker.text.tokenizer import Tokenizer

_Key = tuple[str, str]
"""Text and field of a source."""

MAX_SOURCE_BYTES = 1 << 20
CACHE_BYTES = 256 << 20
"""Of compiled grammars that are kept, by the memory that it took to compile them."""
_CACHE_ENTRIES = 256
_LOCATE_S = 1.0
"""Time to find the place of an error in a schema."""
_PARSER_LIMITS: Mapping[str, Any] = {
    # A step of a hostile grammar ends after about 15 ms; memory of a sequence below 100 MB.
    "max_items_in_row": 2000,
    "initial_lexer_fuel": 1_000_000,
    "step_lexer_fuel": 200_000,
    "step_max_items": 50_000,
    "max_lexer_states": 50_000,
    "max_grammar_size": 500_000,
    "precompute_large_lexemes": False,  # its cost grows with the vocabulary
    "verbose_errors": False,  # they would contain the answer's text
}
_STOP_REASONS = {
    "ParserTooComplex": "the grammar is too complex",
    "LexerTooComplex": "a regular expression is too large",
}


@dataclass(frozen=True)
class GrammarSource:
    """What `GrammarCompiler.compile` takes."""

    text: str
    """In llguidance's Lark dialect, or JSON with several grammars."""
    field: str
    """The field of the job that errors name."""
    schemas: tuple[tuple[str, Mapping[str, Any]], ...] = ()
    """Place and prepared form of the schemas in it, in which an error is located."""


class CompiledGrammar:
    """A compiled grammar: immutable, and shared by sequences and threads."""

    def __init__(self, matcher: LLMatcher, field: str, words: int) -> None:
        self._matcher = matcher
        self._field = field
        self._words = words

    def start(self) -> GrammarMask:
        """The mask of a sequence without generated tokens."""
        return GrammarMask(self._matcher.deep_copy(), self._field, self._words)


class GrammarMask:
    """The tokens that may follow in one sequence; see `worker.sampling.TokenMask`."""

    __slots__ = ("_count", "_field", "_matcher", "_words")

    def __init__(self, matcher: LLMatcher, field: str, words: int) -> None:
        self._matcher = matcher
        self._field = field
        self._words = words
        self._count = 0
        """Tokens accepted so far."""

    def accept(self, token_id: int) -> None:
        """Append an id that was drawn or replayed. Raises InvalidRequest if it is not allowed."""
        try:
            is_allowed = self._matcher.consume_token(token_id)
        except BaseException as error:
            raise _refusal(error, self._field) from error
        if not is_allowed:
            self._fail(f"a grammar that allows the token {token_id} after the first {self._count}")
        self._count += 1

    def fill(self, mask: NDArray[np.uint32]) -> None:
        """Write all words of the mask, which is contiguous. Raises InvalidRequest as `accept` does.

        The caller checks whether a token is allowed: of a dead end the library may make zeros.
        """
        size, words = mask.size, self._words
        assert size >= words, "the library writes to memory without a check"
        assert mask.strides == (4,), "the library writes consecutive words"
        try:
            self._matcher.unsafe_compute_mask_ptr(mask.ctypes.data, 4 * words)
        except BaseException as error:
            raise _refusal(error, self._field) from error
        if size > words:
            mask[words:] = 0
        if self._matcher.get_error():
            self._fail(f"a grammar that the model's tokens can complete, but none can follow the first {self._count}")

    def _fail(self, constraint: str) -> NoReturn:
        reason = _STOP_REASONS.get(self._matcher.stop_reason())
        if reason:
            constraint = f"a simpler grammar: {reason} after {self._count} tokens of the answer"
        raise InvalidRequest.of((self._field, constraint, None))


class GrammarCompiler:
    """Compiles grammars for one vocabulary, and keeps those compiled last. Thread-safe."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._words = -(-tokenizer.vocab.size // 32)
        self._library: LLTokenizer | None = None
        self._checker = GrammarChecker(tokenizer.vocab, _PARSER_LIMITS)
        self._lock = threading.Lock()
        self._building = threading.Lock()
        self._cache: OrderedDict[_Key, tuple[CompiledGrammar | str, int]] = OrderedDict()
        self._cached_bytes = 0

    def prepare(self) -> None:
        """Build llguidance's tokenizer, 0.5 s for 150,000 tokens, and start the checking process.

        Idempotent.
        """
        with self._building:
            if self._library is None and self._tokenizer.vocab.end_ids:
                self._checker.start()
                self._library = library_tokenizer(self._tokenizer)

    def compile(self, source: GrammarSource) -> CompiledGrammar:
        """Compile a grammar, or return the cached one.

        Raises:
            InvalidRequest: It is invalid, no answer satisfies it, or it exceeds a limit.
        """
        key = (source.text, source.field)
        with self._lock:
            if found := self._cache.get(key):
                self._cache.move_to_end(key)
        compiled, size = found or self._compile(source)
        if found is None:
            self._keep(key, compiled, size)
        if isinstance(compiled, str):
            field, _, constraint = compiled.partition("\n")
            raise InvalidRequest.of((field, constraint, None))
        return compiled

    def _keep(self, key: _Key, compiled: CompiledGrammar | str, size: int) -> None:
        with self._lock:
            if key in self._cache:  # another thread compiled it, too
                return
            self._cache[key] = compiled, size
            self._cached_bytes += size
            while self._cached_bytes > CACHE_BYTES or len(self._cache) > _CACHE_ENTRIES:
                _, (_, dropped) = self._cache.popitem(last=False)
                self._cached_bytes -= dropped

    def _compile(self, source: GrammarSource) -> tuple[CompiledGrammar | str, int]:
        """Compile; return the grammar, or field and constraint in two lines, and its memory."""
        size = len(source.text.encode())
        if size > MAX_SOURCE_BYTES:
            return f"{source.field}\nat most {MAX_SOURCE_BYTES} bytes as a grammar, not {size}", 0
        if not self._tokenizer.vocab.end_ids:
            return f"{source.field}\nnone: the model's vocabulary has no end token", 0
        error, peak = self._checker.check(source.text)
        if error:
            return self._explained(source, error), size
        try:
            self.prepare()
            return self._checked(source), size + peak
        except InvalidRequest as refused:
            return f"{source.field}\n{refused.details['errors'][0]['constraint']}", size

    def _checked(self, source: GrammarSource) -> CompiledGrammar:
        """Compile for the vocabulary, with the first mask. Raises InvalidRequest."""
        from llguidance import LLMatcher, LLParserLimits  # noqa: PLC0415  # only jobs with a grammar need it

        library, limits = self._library, LLParserLimits(**_PARSER_LIMITS)
        assert library is not None
        try:
            matcher = LLMatcher(library, source.text, log_level=0, limits=limits)
        except BaseException as error:
            raise _refusal(error, source.field) from error
        if message := matcher.get_error():
            raise InvalidRequest.of((source.field, _sentence(message), None))
        compiled = CompiledGrammar(matcher, source.field, self._words)
        # The states of the first mask are copied into each sequence.
        first = np.zeros(self._words, np.uint32)
        GrammarMask(matcher, source.field, self._words).fill(first)
        if not first.any():
            raise InvalidRequest.of((source.field, "a grammar that begins with one of the model's tokens", None))
        return compiled

    def _explained(self, source: GrammarSource, error: str) -> str:
        """The place of an error, and the error, in two lines."""

        until = time.monotonic() + _LOCATE_S

        def error_of(schema: Mapping[str, Any]) -> str:
            late = time.monotonic() > until
            return "" if late else self._checker.check(f"{OPTIONS}\nstart: {schema_source(schema)}")[0]

        for place, schema in () if error.startswith(TOO_MUCH) else source.schemas:
            if error_of(schema):
                found, error = locate(schema, place, error_of)
                return f"{found}\n{_sentence(error)}"
        return f"{source.field}\n{_sentence(error)}"


def _refusal(error: BaseException, field: str) -> InvalidRequest:
    """The error of one job for an exception of the library; raises what is none of these."""
    as_exception(error)  # raises what is no failure of the library
    return InvalidRequest.of((field, f"a grammar that llguidance can follow ({type(error).__name__})", None))


def _sentence(error: str) -> str:
    """The library's error in one line, without the excerpt of the grammar and internal prefixes."""
    if "oneOf constraints are not supported" in error:
        return "anyOf in place of oneOf, or schemas in oneOf that exclude each other evidently"
    lines = [line for line in error.splitlines() if not re.match(r"\s*(?:\d+ \||\^|<non-verbose)", line)]
    text = " ".join(" ".join(lines).split())
    text = re.sub(r"^at \d+\(\d+\): failed to compile JSON schema: |^WARNING: ", "", text)
    return f"it does not compile: {text[:240]}"
