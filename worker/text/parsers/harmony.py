"""Harmony, gpt-oss's message format: headers with channel and recipient, and the content.

A message is `<|start|>HEADER<|message|>content`, ended by `<|end|>`, `<|return|>` or `<|call|>`.
HEADER is `role [to=R] [<|channel|>NAME [to=R] [[<|constrain|>]TYPE]]` (OpenAI's harmony guide).

| channel and recipient | place of the content |
| --- | --- |
| a recipient | tool; the recipient as the model wrote it |
| analysis | reasoning |
| commentary, final, an unknown channel, no channel | final |

Models write other headers too. Header text that does not follow the grammar is published on the
channel final. So is the text of a header that no `<|message|>` ends, without a known role, channel,
recipient or type.
"""

import re
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

from worker.text.parsers.interface import Piece, Place
from worker.text.vocabulary import Vocabulary

_REQUIRED = ("<|start|>", "<|channel|>", "<|message|>")
_ROLES = ("assistant", "system", "developer", "user", "tool")
_TYPES = ("json", "code", "text", "python", "xml")
_ROLE_GIVEN = "<|end|>"  # a section whose role the prompt gave, or that follows no <|start|>
_NOT_TOOLS = ("assistant", "user", "all")
_MAX_NAME = 32
_MAX_RECIPIENT = 256

_ROLE = re.compile(rf"\s*(?:{'|'.join(_ROLES)})+")
_CHANNEL = re.compile(r"\s*[?.–-]*(analysis|commentary|final)(?:(?=to=)|(?![a-z]))\?*")
_WORD = re.compile(rf"\s*(?!to=)((?:(?!\s)[!-~\W]){{1,{_MAX_NAME}}})(?!\S)")
_RECIPIENT = re.compile(r"\s*to=([^\s<]+)")
_TYPE = re.compile(rf"\s+(?:{'|'.join(_TYPES)})\b")


class _Section(NamedTuple):
    """The words of the grammar in one section of a header."""

    end: int
    """Index after the words; text that follows is not part of the grammar."""
    name: str | None
    """A known channel."""
    guess: str
    """A word that only its place makes a channel or a type."""
    recipient: str | None
    is_open: bool
    """Whether the text after the words may still become a word of the grammar."""


def _read_section(kind: str, text: str) -> _Section:
    """Read the text after the control token `kind`."""
    end, name, guess = 0, None, ""
    if kind in ("<|start|>", _ROLE_GIVEN):
        end = role.end() if (role := _ROLE.match(text)) else 0
    elif kind == "<|channel|>" and (channel := _CHANNEL.match(text)):
        end, name = channel.end(), channel[1]
    elif word := _WORD.match(text):
        end, guess = word.end(), word[0] if word[1] not in _TYPES else ""
    recipient = _RECIPIENT.match(text, end)
    if recipient and len(recipient[1]) > _MAX_RECIPIENT:
        recipient = None
    end = recipient.end() if recipient else end
    if kind == "<|channel|>" and (content_type := _TYPE.match(text, end)):
        end = content_type.end()
    rest = text[end:].strip()
    words = ("to=", *(_ROLES if kind in ("<|start|>", _ROLE_GIVEN) else _TYPES))
    is_open = any(word.startswith(rest) for word in words)
    return _Section(end, name, guess, recipient[1] if recipient else None, is_open)


class HarmonyParser:
    """Parser of an answer in harmony, by control tokens; the prompt sets its first state."""

    marks: tuple[str, ...] = ()

    def __init__(self, vocab: Vocabulary, token_bytes: Callable[[int], bytes], prompt_ids: Sequence[int] = ()) -> None:
        self.place = Place("final")
        special = vocab.special
        names = (*_REQUIRED, "<|constrain|>", "<|end|>", "<|return|>", "<|call|>")
        self._names = {special[name]: name for name in names if name in special}
        self.boundaries = frozenset(self._names)
        self._in_header = False
        self._kind: str | None = None
        """The token that began the header's current section; None after text that is no header."""
        self._text = ""
        """The section's text; its first `_given` characters are the prompt's."""
        self._given = 0
        self._guesses = ""
        """Words of earlier sections, published if no `<|message|>` follows."""
        self._name: str | None = None
        self._recipient: str | None = None
        self._calls = 0
        self._follow(prompt_ids, special["<|start|>"], token_bytes)

    @staticmethod
    def supported_by(vocab: Vocabulary) -> bool:
        """Whether the vocabulary has the tokens of a harmony header."""
        return all(name in vocab.special for name in _REQUIRED)

    @property
    def state(self) -> Literal["start", "content", "other"]:
        """Where the text so far ends: after a message's role, in a content, or elsewhere."""
        if self._kind is None and not self._in_header:
            return "content"
        at_start = self._kind == _ROLE_GIVEN and self._text == "assistant" and self._recipient is None
        return "start" if at_start else "other"

    def push(self, token_id: int, text: str) -> list[Piece]:
        """Add the text of the answer's next token; return the text that can be published."""
        name = self._names.get(token_id)
        if name is None and self._kind is None:
            return [(self.place, text)] if text else []
        pieces = [self._add(text)] if text else []
        if name is not None:  # its text is the end of a code point that is cut off
            pieces.append(self._control(name))
        return [(place, text) for place, text in pieces if text]

    def flush(self) -> list[Piece]:
        """Return the text of a header that no `<|message|>` ended."""
        text = self._close_section()
        return [(self.place, text)] if text else []

    def _follow(self, prompt_ids: Sequence[int], start_id: int, token_bytes: Callable[[int], bytes]) -> None:
        """Advance through a prompt, from its last `<|start|>` on: earlier tokens have no effect."""
        ids = list(prompt_ids)
        first = len(ids) - 1 - ids[::-1].index(start_id) if start_id in ids else 0
        for token_id in ids[first:]:
            is_text = self._kind is not None and token_id not in self._names
            self.push(token_id, token_bytes(token_id).decode(errors="replace") if is_text else "")
        if self._kind == "<|start|>":
            self._kind = _ROLE_GIVEN
        self._given, self._guesses, self._calls = len(self._text), "", 0
        if self.place.channel == "tool":
            self.place, self._calls = self.place._replace(call=0), 1

    def _add(self, text: str) -> Piece:
        if self._kind is None:
            return self.place, text
        self._text += text
        is_open = _read_section(self._kind, self._text).is_open
        return self.place, "" if is_open else self._close_section()

    def _control(self, name: str) -> Piece:
        """Advance by a control token; return the text of the section that it ends, if any."""
        place = self.place
        if name in ("<|message|>", "<|constrain|>") and not self._in_header:
            return place, ""
        if name == "<|message|>":
            text = self._close_section(followed=True)
            self._begin_content()
        elif name == "<|constrain|>":
            text = self._close_section(followed=True)
            self._begin_section(name)
        elif name == "<|channel|>":
            text = self._close_section(followed=self._kind != name)
            self._begin_section(name)
        else:
            text = self._close_section()
            self._name = self._recipient = None
            self._in_header = False
            self._begin_section("<|start|>" if name == "<|start|>" else _ROLE_GIVEN)
        return place, text

    def _begin_section(self, kind: str) -> None:
        if not self._in_header:
            self._in_header, self.place = True, Place("final")
        self._kind, self._text, self._given = kind, "", 0

    def _begin_content(self) -> None:
        name, recipient = self._name, self._recipient
        if recipient is not None and recipient not in _NOT_TOOLS:
            self.place = Place("tool", recipient, self._calls)
            self._calls += 1
        else:
            self.place = Place("reasoning" if name == "analysis" else "final")
        self._in_header, self._kind, self._guesses = False, None, ""
        self._name = self._recipient = None

    def _close_section(self, *, followed: bool = False) -> str:
        """End the header's section and return its text without the words of the grammar.

        `followed`: by a control token as in the grammar, so that a guess is a channel or a type.
        """
        if self._kind is None:
            return ""
        section = _read_section(self._kind, self._text)
        if self._kind == "<|channel|>":
            self._name = section.name
        self._recipient = section.recipient or self._recipient
        is_markup = followed or not (section.guess or self._kind == _ROLE_GIVEN)
        end = max(self._given, section.end) if is_markup else self._given
        rest = self._text[end:].lstrip() if is_markup and end else self._text[end:]
        if followed:
            self._guesses += self._text[self._given : end] if section.guess else ""
        else:
            rest, self._guesses = self._guesses + rest, ""
        self._kind = None
        return rest
