"""The models that living workers serve, from the registry, and requests refused for lack of one."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any, NoReturn

from worker.errors import WorkerError
from worker.gateway.errors import ApiError, invalid, unavailable
from worker.gateway.keys import Caller
from worker.jobs.client import Client
from worker.jobs.streams import Disconnected
from worker.telemetry import Refusals

TAKES_JOBS = ("ready", "busy")
_RETRY_STARTING_S = 2.0
_MAX_DIGITS = 19


def count_in(status: Mapping[str, str], name: str) -> int:
    """A whole number of a worker's status, which anybody may have written; 0 if it is none."""
    text = status.get(name, "")
    return int(text) if text.isascii() and text.isdecimal() and len(text) < _MAX_DIGITS else 0


@dataclass(slots=True)
class ServedModel:
    """One model, as its workers' registry entries describe it."""

    name: str
    seen_s: float
    """`time.monotonic` of the last registry read with a worker that takes jobs."""
    created: int
    """Start of its first worker, in seconds since 1970."""
    workers: int = 0
    context: int = 0
    """Largest context of its workers, in tokens; 0 if unknown."""

    def to_api(self) -> dict[str, Any]:
        """An item of `GET /v1/models`."""
        item = {"id": self.name, "object": "model", "created": self.created, "owned_by": "worker"}
        return item | ({"max_model_len": self.context} if self.context else {})


@dataclass(slots=True)
class _Registry:
    """What the last read of the registry showed."""

    models: dict[str, ServedModel] = field(default_factory=dict)
    workers: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    read_s: float = -float("inf")

    @property
    def one_starts(self) -> bool:
        """Whether a worker loads its model, whose name is known when it is loaded."""
        return any(status.get("state") == "starting" for status in self.workers.values())


class ModelRegistry:
    """The served models. A model stays known while the gateway runs; see `require`.

    `always` are names of models that are available also without a worker: their workers are started
    when jobs wait.
    """

    def __init__(self, client: Client, refresh_s: float, no_worker_s: float, always: Collection[str] = ()) -> None:
        self._client = client
        self._refresh_s = refresh_s
        self._no_worker_s = no_worker_s
        self._always = frozenset(always)
        now, created = time.monotonic(), int(time.time())
        self._registry = _Registry({name: ServedModel(name, now, created) for name in always})
        self.refusal: Disconnected | None = None
        """Why the server refused writes at the last read: then no worker can stay registered."""
        self._reading = asyncio.Lock()

    async def run(self, refusals: Refusals) -> NoReturn:
        """Read the registry periodically; an unreachable server keeps the last state."""
        while True:
            with contextlib.suppress(Disconnected):
                try:
                    await self.refresh()
                    refusals.succeeded("workers")
                except WorkerError as error:
                    refusals.failed("workers", error)
            await asyncio.sleep(self._refresh_s)

    async def refresh(self, newer_than_s: float | None = None) -> None:
        """Read the registry, unless another call did after `newer_than_s` (`time.monotonic`)."""
        async with self._reading:
            if newer_than_s is not None and self._registry.read_s > newer_than_s:
                return
            workers = await self._client.workers()
            try:
                self.refusal = await self._client.write_refusal()
            except Disconnected:  # on a cluster the nodes of the registry may be reached, but not this one
                self.refusal = None
            self._update(workers)

    def _update(self, workers: Mapping[str, Mapping[str, str]]) -> None:
        now, registry = time.monotonic(), self._registry
        registry.workers, registry.read_s = workers, now
        for model in registry.models.values():
            model.workers = 0
            if self.refusal is not None and self._is_available(model):  # its workers cannot register
                model.seen_s = now
        for status in workers.values():
            name = status.get("model", "")
            if not name or status.get("state") not in TAKES_JOBS:
                continue
            started = count_in(status, "started_ms") // 1000
            model = registry.models.setdefault(name, ServedModel(name, now, started))
            model.context = max(model.context if model.workers else 0, count_in(status, "context"))
            model.workers += 1
            model.seen_s, model.created = now, min(model.created, started)

    @property
    def workers(self) -> Mapping[str, Mapping[str, str]]:
        """The status of each living worker at the last read."""
        return self._registry.workers

    def served(self, caller: Caller) -> list[ServedModel]:
        """The available models that the caller may use."""
        models = self._registry.models.values()
        return sorted(
            (model for model in models if self._is_available(model) and caller.may_use(model.name)),
            key=lambda model: model.name,
        )

    def _is_available(self, model: ServedModel) -> bool:
        """Whether the model has or had a worker lately, or is always available."""
        return model.name in self._always or time.monotonic() - model.seen_s <= self._no_worker_s

    def check(self, name: str) -> None:
        """Raise status 503 if the model has had no worker for longer than the setting."""
        model = self._registry.models.get(name)
        if model is None or not self._is_available(model):
            raise self._no_worker(f"no worker serves the model {name}", self._no_worker_s)

    def _no_worker(self, message: str, retry_after_s: float) -> ApiError | Disconnected:
        """Status 503 for lack of a worker, or for the refusal that may be its cause."""
        return self.refusal or unavailable(message, retry_after_s, "no_worker")

    async def require(self, name: str | None, caller: Caller) -> ServedModel:
        """The model that a request names; without a name the only served one.

        Raises:
            ApiError: 400 without a name, 403 if the key does not allow the model, 404 if it is
                unknown, 503 if it has had no worker for longer than the setting.
            Disconnected: the server refuses writes, so a worker may run and not be registered.
        """
        requested_s = time.monotonic()
        if name is None:
            await self._refresh_if(not self.served(caller), requested_s)
            return self._only(caller)
        caller.require_model(name)
        known = self._registry.models.get(name)
        await self._refresh_if(known is None or not self._is_available(known), requested_s)
        if name not in self._registry.models:
            raise self._unknown(name)
        self.check(name)
        return self._registry.models[name]

    async def _refresh_if(self, needed: bool, requested_s: float) -> None:
        if needed:
            await self.refresh(requested_s)

    def _only(self, caller: Caller) -> ServedModel:
        served = self.served(caller)
        if not served:
            raise self._no_worker("no worker is running", self._no_worker_s)
        if len(served) > 1:
            names = ", ".join(model.name for model in served)
            raise invalid(f"model: required, since several are served: {names}", "model", "missing")
        return served[0]

    def _unknown(self, name: str) -> ApiError | Disconnected:
        registry = self._registry
        if registry.one_starts or not registry.models:
            return self._no_worker(f"no worker serves the model {name} yet", _RETRY_STARTING_S)
        message = f"the model {name} does not exist; GET /v1/models lists the served ones"
        return ApiError(HTTPStatus.NOT_FOUND, message, code="model_not_found", param="model")
