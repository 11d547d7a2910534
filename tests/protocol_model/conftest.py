"""The real server of tests/jobs."""

from tests.jobs.conftest import server, session_server

__all__ = ["server", "session_server"]
