"""The HTTP server: uvicorn with httptools and uvloop, and the drain after SIGTERM.

At the first signal new requests get status 503 and open ones are finished, for at most
`gateway.grace_s`; those that are open then end with the error `draining`. A second signal ends the
process at once.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from types import FrameType

import uvicorn

from worker.config import GatewaySection
from worker.errors import ConfigInvalid
from worker.gateway.app import create_app
from worker.gateway.connection import Connection
from worker.gateway.context import GatewayContext

_POLL_S = 0.02
_BACKLOG = 2048


def listen(section: GatewaySection) -> socket.socket:
    """Bind the gateway's address. Raises ConfigInvalid if that fails."""
    family = socket.AF_INET6 if ":" in section.host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((section.host, section.port))
    except OSError as error:
        listener.close()
        where, reason = f"{section.host}:{section.port}", error.strerror or str(error)
        raise ConfigInvalid(f"gateway.port: cannot listen on {where} ({reason}); choose another with --port") from None
    listener.listen(_BACKLOG)
    listener.setblocking(False)
    return listener


class GatewayServer(uvicorn.Server):
    """uvicorn's server whose first signal starts a drain."""

    def __init__(self, context: GatewayContext) -> None:
        _silence_packages()
        config = uvicorn.Config(
            create_app(context),
            http=Connection,
            ws="none",
            loop="none",
            lifespan="on",
            access_log=False,
            log_config=None,
            server_header=False,
            proxy_headers=False,
            backlog=_BACKLOG,
            timeout_graceful_shutdown=1,
        )
        super().__init__(config)
        self._context = context
        self._drain: asyncio.Task[None] | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Handle SIGTERM or SIGINT: drain on the first signal, stop immediately on the second."""
        if self._context.draining:
            self.should_exit = self.force_exit = self._context.stopping = True
        else:
            self.drain()

    def drain(self) -> None:
        """Refuse new requests; exit when the open ones are finished."""
        self._context.draining = True
        self._drain = asyncio.get_running_loop().create_task(self._exit_when_idle())

    async def _exit_when_idle(self) -> None:
        context = self._context
        context.log.info("draining", open_requests=context.open_requests)
        deadline = time.monotonic() + context.section.grace_s
        while context.open_requests and time.monotonic() < deadline:
            await asyncio.sleep(_POLL_S)
        if context.open_requests:
            context.stop()
        self.should_exit = True


def _silence_packages() -> None:
    """Discard what packages log: the gateway has a log of its own, of which every line is JSON."""
    for name in ("uvicorn", "python_multipart"):
        logger = logging.getLogger(name)
        logger.propagate = False
        if not logger.handlers:
            logger.addHandler(logging.NullHandler())


async def serve(context: GatewayContext, listener: socket.socket) -> None:
    """Serve requests of the bound `listener` until a signal has ended the drain."""
    server = GatewayServer(context)
    host, port = listener.getsockname()[:2]
    context.log.info("listening", host=host, port=port)
    await server.serve([listener])
