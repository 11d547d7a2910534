"""The gateway's view of queues and workers for /metrics, read from the server by one loop.

A scrape reads what the loop has set, so it costs the server nothing, however often it happens.
"""

from __future__ import annotations

import asyncio
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import astuple
from typing import NoReturn

from worker.errors import ServerRefused
from worker.gateway.context import GatewayContext
from worker.gateway.models import TAKES_JOBS
from worker.jobs.streams import Disconnected, QueueDepth
from worker.queue_order import QUEUE_NAME, queues_of

MAX_LABELS = 100
"""Limit of queues, and of models, with metrics. The registry may have any number of workers."""
MAX_MODEL_NAME = 256
_QUEUE = re.compile(QUEUE_NAME)


class QueueWatch:
    """Keeps the metrics of queues and workers current. Without the server there are none.

    While the server refuses writes, there are no metrics of workers.

    A queue or model that a worker had stays: jobs may wait for it.
    """

    def __init__(self, context: GatewayContext) -> None:
        self._context = context
        self._queues = {context.client.queue_name}
        self._models: set[str] = set()

    async def run(self) -> NoReturn:
        """Refresh periodically."""
        while True:
            await self.refresh()
            await asyncio.sleep(self._context.section.registry_s)

    async def refresh(self) -> None:
        """Read the registry, and the queues of this gateway and of the workers."""
        client, metrics, refusals = self._context.client, self._context.metrics, self._context.refusals
        depths: dict[str, QueueDepth] = {}
        try:
            workers = (await client.workers()).values()
            refusals.succeeded("workers")
            _extend(self._queues, filter(_QUEUE.fullmatch, frozenset().union(*map(queues_of, workers))))
            for queue in sorted(self._queues):
                try:
                    depths[queue] = await client.queue_depth(queue, self._context.lease_s)
                    refusals.succeeded(f"depth {queue}")
                except ServerRefused as error:  # such as a key of another type
                    refusals.failed(f"depth {queue}", error)
        except (Disconnected, ServerRefused) as error:
            metrics.clear_queues()
            if isinstance(error, ServerRefused):
                refusals.failed("workers", error)
            return
        metrics.clear_queues()
        for queue, depth in depths.items():
            metrics.queues.set(queue, *astuple(depth))
        if self._context.models.refusal is None:  # otherwise workers may run and not be registered
            metrics.server_reached.set(1)
            taking = [status for status in workers if status.get("state") in TAKES_JOBS]
            self._set_queue_workers(depths, taking)
            self._set_models(taking)

    def _set_queue_workers(self, queues: Iterable[str], workers: Iterable[Mapping[str, str]]) -> None:
        serving = Counter(queue for status in workers for queue in queues_of(status))
        for queue in queues:
            self._context.metrics.queue_workers.labels(queue).set(serving[queue])

    def _set_models(self, workers: Iterable[Mapping[str, str]]) -> None:
        metrics = self._context.metrics
        by_model: dict[str, list[Mapping[str, str]]] = {}
        for status in workers:
            if 0 < len(model := status.get("model", "")) <= MAX_MODEL_NAME:
                by_model.setdefault(model, []).append(status)
        _extend(self._models, by_model)
        for model in self._models:
            serving = by_model.get(model, [])
            metrics.model_workers.labels(model).set(len(serving))
            if serving:
                used, blocks = _sum(serving, "kv_blocks_used"), _sum(serving, "kv_blocks")
                metrics.kv_usage.labels(model).set(used / max(1, blocks))


def _extend(known: set[str], names: Iterable[str]) -> None:
    """Add names to the known ones, up to MAX_LABELS in all."""
    known.update(sorted(set(names) - known)[: MAX_LABELS - len(known)])


def _sum(workers: Iterable[Mapping[str, str]], field: str) -> float:
    texts = [status.get(field, "") for status in workers]
    return sum(float(text) for text in texts if re.fullmatch("[0-9]{1,15}", text))
