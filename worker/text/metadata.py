"""Typed reading of a GGUF file's tokenizer metadata: every value that is missing or of the wrong kind is named.

Knows nothing of what the values mean. Read next: vocabulary.py, which gives them their meaning.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from worker.errors import ModelLoadFailed


class Metadata:
    """GGUF keys and their Python values; an array is a list or a NumPy array.

    Every method raises ModelLoadFailed, naming the key, for a value that is of another kind than asked for.
    """

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._values = values

    def text(self, key: str, default: str) -> str:
        """Return a string, or `default` where the file has none."""
        value = self._values.get(key, default)
        if not isinstance(value, str):
            raise self._wrong(key, value, "a string")
        return value

    def flag(self, key: str, default: bool) -> bool:
        """Return a boolean, or `default` where the file has none."""
        value = self._values.get(key, default)
        if not isinstance(value, bool | np.bool_):
            raise self._wrong(key, value, "a boolean")
        return bool(value)

    def count(self, key: str) -> int:
        """Return a non-negative number, 0 where the file has none."""
        value = self._values.get(key, 0)
        if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 0:
            raise self._wrong(key, value, "a number, 0 or more")
        return int(value)

    def row(self, key: str, rows: int) -> int | None:
        """Return a token id, or None where the file has none or names a row past the vocabulary's end."""
        if key not in self._values:
            return None
        row = self.count(key)
        return row if row < rows else None

    def strings(self, key: str) -> list[str]:
        """Return a required array of strings, all of them valid Unicode text."""
        value = self._array(key)
        if not set(map(type, value)) <= {str}:
            raise self._wrong(key, value, "an array of strings")
        try:
            "".join(value).encode()
        except UnicodeEncodeError as error:
            raise ModelLoadFailed("a string is not UTF-8", key, "an array of UTF-8 strings") from error
        return value

    def numbers(self, key: str, rows: int, default: float) -> list[Any]:
        """Return one number a row; `default` for each where the file has no such array."""
        if key not in self._values:
            return [default] * rows
        value = self._array(key)
        if not set(map(type, value)) <= {int, float}:
            raise self._wrong(key, value, "an array of numbers")
        if len(value) < rows:
            raise ModelLoadFailed(f"it has {len(value)} numbers", key, f"{rows}, one for each token")
        return value[:rows]

    def _array(self, key: str) -> list[Any]:
        value = self._values.get(key)
        if isinstance(value, np.ndarray):
            value = value.tolist()
        if not isinstance(value, list | tuple) or not value:
            raise self._wrong(key, value, "an array that is not empty")
        return list(value)

    @staticmethod
    def _wrong(key: str, value: object, expected: str) -> ModelLoadFailed:
        what = "it is missing" if value is None else f"it is {type(value).__name__} {str(value)[:60]!r}"
        return ModelLoadFailed(what, key, expected)
