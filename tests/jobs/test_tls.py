"""Connections over TLS to a server, a cluster and a master behind Sentinel.

Proxies end the connections, since the tests' server has no TLS.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import ssl
from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import pytest_asyncio
import trustme
from redis import exceptions

from tests.jobs.cluster import ClusterServer, running_cluster
from tests.jobs.proxy import running_proxy
from tests.jobs.servers import Server
from worker.errors import ServerRefused
from worker.jobs.client import Client
from worker.jobs.redis_errors import translate
from worker.jobs.redis_resp import pack_command
from worker.jobs.redis_streams import RedisStreams
from worker.jobs.streams import Disconnected


class Certificates:
    """A certificate authority, and files of what it issues."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._ca = trustme.CA()
        self.ca = self._write("ca.pem", self._ca.cert_pem)
        self.other_ca = self._write("other-ca.pem", trustme.CA().cert_pem)
        client = self._ca.issue_cert("worker@localhost")
        self.client = self._write("client.pem", *client.cert_chain_pems)
        self.client_key = self._write("client-key.pem", client.private_key_pem)
        foreign = trustme.CA().issue_cert("worker@localhost").private_key_and_cert_chain_pem
        self.foreign_client = self._write("foreign-client.pem", foreign)

    def _write(self, name: str, *blobs: trustme.Blob) -> Path:
        path = self._folder / name
        path.write_bytes(b"".join(blob.bytes() for blob in blobs))
        return path

    def context(self, *names: str, expired: bool = False, client_required: bool = False) -> ssl.SSLContext:
        """A server's context with a certificate for these names; by default those of loopback."""
        end = datetime.now(UTC) - timedelta(days=1) if expired else None
        issued = self._ca.issue_cert(*(names or ("localhost", "127.0.0.1")), not_after=end)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        issued.configure_cert(context)
        if client_required:
            self._ca.configure_trust(context)
            context.verify_mode = ssl.CERT_REQUIRED
        return context


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return Certificates(tmp_path_factory.mktemp("tls"))


@pytest.fixture(scope="module")
def tls_cluster() -> Iterator[ClusterServer]:
    """Its own, since its nodes announce the ports of proxies."""
    with running_cluster() as cluster:
        yield cluster


@contextlib.asynccontextmanager
async def tls_sentinel(master_port: int, context: ssl.SSLContext) -> AsyncIterator[int]:
    """The port of a sentinel that reports the master at a proxy's port."""
    master = pack_command(["ip", "127.0.0.1", "port", str(master_port), "config-epoch", "1"])

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            if found := re.fullmatch(rb".*PING\r\n\$\d+\r\n(\d+).*SENTINEL.*?(\d+)\r\n", await reader.read(1000), re.S):
                writer.write(b"+%b\r\n%b+%b\r\n" % (found[1], master, found[2]))
            await reader.read()
            writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0, ssl=context)
    async with server:
        yield server.sockets[0].getsockname()[1]


@contextlib.asynccontextmanager
async def served(kind: str, context: ssl.SSLContext, server: Server, cluster: ClusterServer) -> AsyncIterator[str]:
    """The URL of a server of this kind behind proxies, without options."""
    async with contextlib.AsyncExitStack() as stack:
        if kind == "cluster":
            for node in cluster.nodes:
                proxy = await stack.enter_async_context(running_proxy(node.port, context))
                cluster.run(node, "CONFIG", "SET", "cluster-announce-port", proxy.port)
            yield f"rediss+cluster://127.0.0.1:{proxy.port}"
            return
        proxy = await stack.enter_async_context(running_proxy(server.port, context))
        if kind == "server":
            yield f"rediss://127.0.0.1:{proxy.port}"
            return
        port = await stack.enter_async_context(tls_sentinel(proxy.port, context))
        yield f"rediss+sentinel://127.0.0.1:{port}/main"


@pytest_asyncio.fixture(params=["server", "cluster", "sentinel"])
async def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


async def outcome(url: str) -> str:
    """`connected`, or the message of the failure."""
    streams = RedisStreams.from_url(url)
    try:
        await streams.time_ms()
    except (ServerRefused, Disconnected) as error:
        return str(error)
    finally:
        await streams.close()
    return "connected"


async def test_jobs_over_tls_with_a_client_certificate(
    kind: str, certificates: Certificates, server: Server, tls_cluster: ClusterServer
) -> None:
    own = f"ssl_certfile={certificates.client}&ssl_keyfile={certificates.client_key}"
    async with served(kind, certificates.context(client_required=True), server, tls_cluster) as url:
        client = Client.from_url(f"{url}?ssl_ca_certs={certificates.ca}&ssl_min_version=TLSv1.3&{own}")
        job_ids = [await client.submit(prompt="hello") for _ in range(5)]
        assert [await client.cancel(job_id) for job_id in job_ids] == ["cancelled"] * 5
        await client.close()


@pytest.mark.parametrize(
    ("names", "expired", "ca", "words"),
    [
        ((), False, "other_ca", "TLS failed (certificate not accepted: unable to get local issuer certificate)"),
        (("redis.example",), False, "ca", "certificate not accepted: IP address mismatch"),
        ((), True, "ca", "TLS failed (certificate not accepted: certificate has expired)"),
    ],
)
async def test_a_server_s_certificate_that_is_not_accepted_is_named(
    kind: str,
    names: tuple[str, ...],
    expired: bool,
    ca: str,
    words: str,
    certificates: Certificates,
    server: Server,
    tls_cluster: ClusterServer,
) -> None:
    async with served(kind, certificates.context(*names, expired=expired), server, tls_cluster) as url:
        message = await outcome(f"{url}?ssl_ca_certs={getattr(certificates, ca)}")
        assert message.startswith(f"{url} refuses: TLS failed (certificate not accepted: ")
        assert words in message
        assert message.endswith("; see the options of TLS in docs/operations.md")


async def test_a_client_s_certificate_that_is_missing_or_not_accepted_is_named(
    kind: str, certificates: Certificates, server: Server, tls_cluster: ClusterServer
) -> None:
    async with served(kind, certificates.context(client_required=True), server, tls_cluster) as url:
        trusted = f"{url}?ssl_ca_certs={certificates.ca}"
        foreign = f"ssl_certfile={certificates.foreign_client}&ssl_keyfile={certificates.foreign_client}"
        for options in (trusted, f"{trusted}&{foreign}"):
            message = await outcome(options)  # the proxy closes the connection; other servers give the reason
            assert message.startswith(f"cannot reach {url} (")
            assert message.endswith("; does it require a client certificate?)")


@pytest.mark.parametrize(
    ("reason", "words"),
    [
        ("TLSV13_ALERT_CERTIFICATE_REQUIRED", "it requires a client certificate: ssl_certfile and ssl_keyfile"),
        ("TLSV1_ALERT_UNKNOWN_CA", "it does not accept the client certificate"),
        ("SSLV3_ALERT_HANDSHAKE_FAILURE", "it may require a client certificate"),
    ],
)
def test_the_server_s_reason_is_named(reason: str, words: str) -> None:
    error, cause = exceptions.ConnectionError("x"), ssl.SSLError(1, "x")
    cause.reason = reason
    error.__cause__ = cause
    assert words in str(translate(error, "rediss://h:1"))


async def test_checks_that_are_switched_off(certificates: Certificates, server: Server) -> None:
    async with running_proxy(server.port, certificates.context("redis.example")) as proxy:
        address = f"rediss://127.0.0.1:{proxy.port}"
        assert await outcome(f"{address}?ssl_cert_reqs=none") == "connected"
        assert await outcome(f"{address}?ssl_ca_certs={certificates.ca}&ssl_check_hostname=false") == "connected"


async def test_a_file_that_holds_no_certificate_is_named(
    certificates: Certificates, server: Server, tmp_path: Path
) -> None:
    (tmp_path / "ca.pem").write_text("nothing")
    async with running_proxy(server.port, certificates.context()) as proxy:
        url = f"rediss://localhost:{proxy.port}?ssl_ca_certs={tmp_path}/ca.pem"
        assert "TLS failed (no certificate or crl found)" in await outcome(url)


async def test_a_server_that_expects_tls_is_unreachable_without(certificates: Certificates, server: Server) -> None:
    async with running_proxy(server.port, certificates.context()) as proxy:
        url = f"redis://127.0.0.1:{proxy.port}"
        assert (await outcome(url)).startswith(f"cannot reach {url} (")
