"""Servers with the users of `deploy/redis/users.acl`."""

from __future__ import annotations

import hashlib
from pathlib import Path

from redis import Redis

from tests.jobs.servers import Server

USERS = Path(__file__).parents[2] / "deploy" / "redis" / "users.acl"
ROLES = ("orchestrator", "worker", "operator", "gateway")


def password_of(user: str) -> str:
    return f"s3cret-of-{user}"


def acl_file(folder: Path) -> Path:
    """The file with a password for each user, set as deploy/redis/README.md describes."""
    path = folder / "users.acl"
    text = USERS.read_text("utf-8")
    for user in ("admin", *ROLES):
        digest = hashlib.sha256(password_of(user).encode()).hexdigest()
        text = text.replace(f"user {user} on", f"user {user} on #{digest}")
    path.write_text(text)
    return path


def admin_of(server: Server) -> Redis:
    return Redis(port=server.port, username="admin", password=password_of("admin"), protocol=2)


def url_of(server: Server, user: str) -> str:
    return f"redis://{user}:{password_of(user)}@127.0.0.1:{server.port}"
