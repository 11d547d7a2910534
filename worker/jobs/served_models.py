"""The models that the other workers of a queue serve, by their entries in the registry.

A worker that claims a job of another model gives it back if one of them serves it (`consumer.py`).
"""

import time

from worker.errors import ServerRefused
from worker.jobs.streams import Streams, retry_until_connected
from worker.queue_order import queues_of

_VALID_S = 1.0
_RELISTED_S = 6.0
"""A server that was away or emptied lists a worker again at its next heartbeat, after 5 s."""


class ServedModels:
    """Cached: a lookup reads the registry at most once a second."""

    def __init__(self, streams: Streams, queue: str, worker_id: str) -> None:
        self._streams = streams
        self._queue = queue
        self._worker_id = worker_id
        self._reconnects = streams.reconnects
        self._models: frozenset[str] = frozenset()
        self._one_loads = False
        self._valid_until_s = 0.0
        self._incomplete_until_s = 0.0

    async def refresh(self) -> None:
        """Read the registry unless that was done within the last second.

        While the server refuses to read it, any worker may serve any model.
        """
        if time.monotonic() < self._valid_until_s:
            return
        try:
            workers = await retry_until_connected(self._streams.workers)
        except ServerRefused:
            workers = {}
        now_s = time.monotonic()
        if self._worker_id not in workers or self._reconnects != self._streams.reconnects:
            self._reconnects, self._incomplete_until_s = self._streams.reconnects, now_s + _RELISTED_S
        others = [status for worker, status in workers.items() if worker != self._worker_id]
        of_queue = [status for status in others if self._queue in queues_of(status)]
        self._models = frozenset(status.get("model", "") for status in of_queue if status.get("state") != "failed")
        self._one_loads = any(status.get("state") == "starting" for status in of_queue)
        self._valid_until_s = now_s + _VALID_S

    def __contains__(self, model: str) -> bool:
        """Whether another worker served the model at the last `refresh`, or may have.

        The name of a model is known when it is loaded.
        """
        return model in self._models or self._one_loads or time.monotonic() < self._incomplete_until_s
