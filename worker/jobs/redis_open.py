"""From a URL to the `Server` that it names."""

from collections.abc import Callable

from worker.jobs.redis_cluster import Cluster
from worker.jobs.redis_pool import OnConnect
from worker.jobs.redis_sentinel import Sentinels
from worker.jobs.redis_server import Server, SingleServer
from worker.redis_url import RedisUrl


def open_server(
    url: RedisUrl, on_connect: OnConnect | None = None, on_failover: Callable[[], None] | None = None
) -> Server:
    """The server, cluster or monitored master of a URL; it connects on first use.

    `on_connect` logs in on each new connection. `on_failover` is called when a slot of a cluster
    has another master than before.
    """
    if url.kind == "cluster":
        return Cluster(url.addresses, lambda address: SingleServer(url, address, on_connect), on_failover)
    locate = Sentinels(url).master if url.kind == "sentinel" else None
    return SingleServer(url, url.addresses[0] if url.addresses else None, on_connect, locate)
