"""API keys: which tenant a key belongs to, which models it may use, and how fast.

    [[keys]]
    key = "sk-…"                 # or key_sha256, the digest of the key in hex
    tenant = "team-a"
    models = ["SmolLM2"]         # all without it
    requests_per_minute = 600    # no limit without it
    tokens_per_minute = 100000   # of prompts and answers

Rates are token buckets of one minute's rate. Each gateway process counts for itself.
"""

from __future__ import annotations

import hashlib
import time
import tomllib
from collections.abc import Callable, Mapping
from http import HTTPStatus
from pathlib import Path
from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from worker.errors import ConfigInvalid
from worker.gateway.errors import ApiError, too_many

Clock = Callable[[], float]
Rate = Annotated[int, Field(ge=1)]


class KeyEntry(BaseModel):
    """One key of the file."""

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    key: Annotated[str, Field(min_length=8)] | None = None
    key_sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")] | None = None
    tenant: Annotated[str, Field(min_length=1, max_length=256)]
    models: tuple[str, ...] | None = None
    requests_per_minute: Rate | None = None
    tokens_per_minute: Rate | None = None

    @model_validator(mode="after")
    def _one_form(self) -> Self:
        if (self.key is None) == (self.key_sha256 is None):
            raise ValueError("must have either key or key_sha256")
        return self

    @property
    def digest(self) -> str:
        """SHA-256 of the key in hex."""
        return self.key_sha256 or _digest(self.key or "")


class _KeyFile(BaseModel):
    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True)

    keys: list[KeyEntry] = Field(min_length=1)


class Bucket:
    """A token bucket: `per_minute` units a minute, at most one minute's units saved up."""

    def __init__(self, per_minute: int, clock: Clock) -> None:
        self._rate = per_minute / 60
        self._most = self._left = float(per_minute)
        self._clock = clock
        self._updated = clock()

    def wait_s(self, units: float = 1.0) -> float:
        """Seconds until that many units are there; 0 if they are."""
        now = self._clock()
        self._left = min(self._most, self._left + (now - self._updated) * self._rate)
        self._updated = now
        return max(0.0, (units - self._left) / self._rate)

    def take(self, units: float) -> None:
        """Take units; the balance may become negative, and later refills offset it."""
        self._left -= units


class Caller:
    """The sender of a request: an API key with its limits; no limits if the gateway has no keys."""

    def __init__(self, entry: KeyEntry | None = None, clock: Clock = time.monotonic) -> None:
        self.tenant = entry.tenant if entry else None
        self.digest = entry.digest if entry else None
        """SHA-256 of the key in hex."""
        self._models = entry.models if entry else None
        requests, tokens = (entry.requests_per_minute, entry.tokens_per_minute) if entry else (None, None)
        self._requests = Bucket(requests, clock) if requests else None
        self._tokens = Bucket(tokens, clock) if tokens else None

    def admit(self) -> None:
        """Count a request that runs jobs. Raises status 429 above a rate."""
        if self._tokens is not None and (wait_s := self._tokens.wait_s()):
            raise too_many("the API key's rate of tokens is used up", wait_s, "tokens_per_minute")
        if self._requests is not None:
            if wait_s := self._requests.wait_s():
                raise too_many("the API key's rate of requests is used up", wait_s, "requests_per_minute")
            self._requests.take(1)

    def charge(self, tokens: int) -> None:
        """Count the tokens of a finished job, prompt and answer."""
        if self._tokens is not None:
            self._tokens.take(tokens)

    def may_use(self, model: str) -> bool:
        """Whether the key allows the model."""
        return self._models is None or model in self._models

    def require_model(self, model: str) -> None:
        """Raise status 403 unless the key allows the model."""
        if not self.may_use(model):
            message = f"the API key may not use the model {model}"
            raise ApiError(HTTPStatus.FORBIDDEN, message, code="model_not_allowed", param="model")


class ApiKeys:
    """The keys of the file, or none: then every request is admitted."""

    def __init__(self, entries: list[KeyEntry] | None = None, clock: Clock = time.monotonic) -> None:
        self._callers = {entry.digest: Caller(entry, clock) for entry in entries or ()}
        self._unrestricted = None if entries else Caller()
        """The caller of every request if there are no keys."""

    @classmethod
    def load(cls, path: str) -> ApiKeys:
        """Read the file; an empty path means no keys. Raises ConfigInvalid without a key in it."""
        if not path:
            return cls()
        try:
            entries = _KeyFile.model_validate(tomllib.loads(Path(path).expanduser().read_text("utf-8"))).keys
        except OSError as error:
            raise ConfigInvalid(f"gateway.api_keys: {path} cannot be read ({error.strerror})") from None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError):
            raise ConfigInvalid(f"gateway.api_keys: {path} is not TOML") from None
        except ValidationError as error:
            mistakes = [f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors()]
            raise ConfigInvalid(f"gateway.api_keys: {path}: {'; '.join(mistakes)}") from None
        if len({entry.digest for entry in entries}) < len(entries):
            raise ConfigInvalid(f"gateway.api_keys: {path} has the same key twice")
        return cls(entries)

    def of_digest(self, digest: str | None) -> Caller | None:
        """Return the caller with this digest of its key, None if the file does not have the key.

        Without keys, return the caller of every request.
        """
        if self._unrestricted is not None:
            return self._unrestricted
        return self._callers.get(digest or "")

    def caller(self, headers: Mapping[str, str]) -> Caller:
        """The caller by `Authorization: Bearer KEY` or `x-api-key`. Raises status 401."""
        if self._unrestricted is not None:
            return self._unrestricted
        scheme, _, key = headers.get("authorization", "").partition(" ")
        given = key.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")
        caller = self._callers.get(_digest(given)) if given else None
        if caller is None:
            message = "the API key is not valid" if given else "no API key; send Authorization: Bearer KEY"
            headers_401 = {"www-authenticate": "Bearer"}
            raise ApiError(HTTPStatus.UNAUTHORIZED, message, code="invalid_api_key", headers=headers_401)
        return caller


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()
