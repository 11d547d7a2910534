"""The connections of the HTTP server: uvicorn's protocol over httptools, and two corrections.

uvicorn reports the end of a connection to its last request only, and stops reading, so that it does
not see the end, while a request waits for the response to the one before it (HTTP pipelining). A
client that disconnects then would not cancel the job of the request that runs.
"""

from __future__ import annotations

from typing import Any

from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle


class Connection(HttpToolsProtocol):
    """One connection, on which one request may wait for the response to the one before it.

    The connection is closed when a second request waits, or one with a large body.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._answered: RequestResponseCycle | None = None
        """The request that runs while another one waits."""

    def on_headers_complete(self) -> None:
        """Begin or queue a request; keep reading, so that the end of the connection is seen."""
        running, waiting = self.cycle, len(self.pipeline)
        super().on_headers_complete()
        if len(self.pipeline) == waiting:
            return
        if waiting:
            self.transport.close()
            return
        self._answered = running
        self.flow.resume_reading()

    def on_body(self, body: bytes) -> None:
        """Keep a part of a body; a large one of a request that waits closes the connection."""
        super().on_body(body)
        if self.pipeline and len(self.cycle.body) > HIGH_WATER_LIMIT:
            self.transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        """Report the end to the request that runs too."""
        if self._answered is not None and not self._answered.response_complete:
            self._answered.disconnected = True
            self._answered.message_event.set()
        super().connection_lost(exc)
