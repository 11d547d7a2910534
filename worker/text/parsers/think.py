"""`<think>…</think>`: the reasoning of Qwen3, DeepSeek-R1, SmolLM3 and others, before the answer.

The answer begins with `<think>`, or the prompt ends with it. Newlines next to the marks are markup.
A mark elsewhere is text. If `</think>` is missing, all is reasoning, except that a call in
the XML form ends it (Qwen3-Coder and Qwen3.5 omit the mark there).
"""

import re
from collections.abc import Sequence

from worker.text.parsers.interface import Parser, Piece, Place, TextParser, partial_mark
from worker.text.tokenizer import Tokenizer

_OPEN, _CLOSE = "<think>", "</think>"
_CALL = re.compile(r"<tool_call>\s*<function=")


class ThinkParser(TextParser):
    """Parser of reasoning; `content` parses the text after it, which is final without one."""

    def __init__(self, *, opened: bool, content: Parser | None, ended_by_call: bool = False) -> None:
        super().__init__(self._opened if opened else self._start)
        self.marks = (_OPEN, _CLOSE, *(content.marks if content else ()))
        self._content = content
        self._ended_by_call = ended_by_call
        self._in_content = False
        if opened:
            self.place = Place("reasoning")

    def push(self, token_id: int, text: str) -> list[Piece]:
        """Add the text of the answer's next token; return the text that can be published."""
        if not self._in_content:
            return super().push(token_id, text)
        if self._content is None:
            return [(self.place, text)] if text else []
        pieces = self._content.push(token_id, text)
        self.place = self._content.place
        return list(pieces)

    def flush(self) -> list[Piece]:
        """Return the withheld text, at the end of the answer."""
        pieces = super().flush()
        if self._content is not None:
            pieces += self._content.flush()
            self.place = self._content.place if self._in_content else self.place
        return pieces

    def _start(self, last: bool) -> bool:
        """At the start of the answer: white space, then `<think>` or content."""
        text = self._held.lstrip()
        if text.startswith(_OPEN):
            self._held = text.removeprefix(_OPEN)
            self.place = Place("reasoning")
            self._state = self._opened
            return True
        if _OPEN.startswith(text) and not last:
            return False
        return self._begin_content()

    def _opened(self, last: bool) -> bool:
        """After `<think>`: newlines; a model may repeat the mark that the prompt ends with."""
        text = self._held.lstrip()
        if text.startswith(_OPEN):
            self._held = text.removeprefix(_OPEN)
            return True
        if _OPEN.startswith(text) and not last:
            return False
        self._held = self._held.lstrip("\n")
        self._state = self._reasoning
        return True

    def _reasoning(self, last: bool) -> bool:
        end = self._held.find(_CLOSE)
        call = _CALL.search(self._held) if self._ended_by_call else None
        if call and (end < 0 or call.start() < end):
            self._publish_before(call.start())
            return self._begin_content()
        if end >= 0:
            self._publish_before(end)
            self._take(len(_CLOSE))
            self._state = self._closed
            return True
        withheld = max(partial_mark(self._held, (_CLOSE,)), self._partial_call())
        self._publish_all_but(withheld, last)
        return False

    def _partial_call(self) -> int:
        """The length of the end of the withheld text that may become a call."""
        if not self._ended_by_call:
            return 0
        at = self._held.rfind("<tool_call>")
        if at >= 0 and "<function=".startswith(self._held[at + len("<tool_call>") :].lstrip()):
            return len(self._held) - at
        return partial_mark(self._held, ("<tool_call>",))

    def _closed(self, last: bool) -> bool:
        """After `</think>`: newlines."""
        self._held = self._held.lstrip("\n")
        return bool(self._held) and self._begin_content()

    def _begin_content(self) -> bool:
        self._in_content = True
        text = self._take(len(self._held))
        if self._content is None:
            self.place = Place("final")
            self._publish(text)
        else:
            self._pieces += self._content.push(-1, text)
            self.place = self._content.place
        return False


def opens_thinking(tokenizer: Tokenizer, prompt_ids: Sequence[int]) -> bool:
    """Whether the prompt's last turn has an open `<think>`."""
    return opens_reasoning(tokenizer, prompt_ids, _OPEN, (_CLOSE,))


def opens_reasoning(tokenizer: Tokenizer, prompt_ids: Sequence[int], opening: str, closing: Sequence[str]) -> bool:
    """Whether the prompt's last turn has an `opening` mark without a `closing` one after it.

    The last turn follows the last control token. In a prompt without one, only a mark at the end
    counts: the text of users may contain marks.
    """
    vocab = tokenizer.vocab
    marks = {vocab.special[mark]: mark.encode() for mark in (opening, *closing) if mark in vocab.special}
    turn: list[bytes] = []
    has_turns = False
    for token_id in reversed(prompt_ids):
        data = marks.get(token_id) or tokenizer.token_bytes(token_id)
        if not data and token_id != vocab.bos_id:
            has_turns = True
            break
        turn.append(data)
    _, opened, rest = b"".join(reversed(turn)).decode(errors="replace").rpartition(opening)
    return bool(opened) and not any(mark in rest for mark in closing) and (has_turns or not rest.strip())
