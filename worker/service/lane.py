"""A lane of a worker: one of the `max_running` places for jobs. `service.py` runs the lanes."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from worker.jobs.lease import Claim


class Lane:
    """A place for one job at a time.

    The claim of its next job may begin while the last events of the present one are published.
    """

    def __init__(self, claim: Callable[[], Coroutine[Any, Any, Claim | None]]) -> None:
        self._claim = claim
        self.claiming: asyncio.Task[Claim | None] | None = None
        """Returns the entry after that of the running job."""

    def begin_claim(self) -> None:
        """Claim the next entry in the background, unless that has begun."""
        if self.claiming is None:
            self.claiming = asyncio.create_task(self._claim())

    async def next_claim(self) -> Claim | None:
        """The next entry, or None after about `scan_s`."""
        claiming, self.claiming = self.claiming, None
        return await (claiming or self._claim())

    def close(self) -> None:
        """Cancel the claim that has begun."""
        if self.claiming is not None:
            self.claiming.cancel()
