"""Connections over TLS, through a proxy that ends them: the tests' server has no TLS."""

from __future__ import annotations

import shutil
import ssl
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from tests.jobs.proxy import running_proxy
from tests.jobs.servers import Server
from worker.errors import ServerRefused
from worker.jobs.redis_streams import RedisStreams
from worker.jobs.streams import Disconnected

OPENSSL = shutil.which("openssl")
pytestmark = pytest.mark.skipif(OPENSSL is None, reason="openssl makes the certificate")


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A self-signed certificate of `localhost`, with its key in the same file."""
    folder = tmp_path_factory.mktemp("tls")
    command = [str(OPENSSL), "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=localhost"]
    command += ["-addext", "subjectAltName=DNS:localhost", "-keyout", "key.pem", "-out", "cert.pem"]
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
    return folder / "cert.pem"


@pytest_asyncio.fixture
async def port(server: Server, certificate: Path) -> AsyncIterator[int]:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate, certificate.with_name("key.pem"))
    async with running_proxy(server.port, context) as proxy:
        yield proxy.port


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


async def test_a_trusted_certificate(port: int, certificate: Path) -> None:
    assert await outcome(f"rediss://localhost:{port}?ssl_ca_certs={certificate}&ssl_min_version=TLSv1.3") == "connected"
    assert await outcome(f"rediss://localhost:{port}?ssl_cert_reqs=none") == "connected"
    unchecked = f"ssl_ca_certs={certificate}&ssl_check_hostname=false"
    assert await outcome(f"rediss://127.0.0.1:{port}?{unchecked}") == "connected"


async def test_a_certificate_that_is_not_accepted_is_named(port: int, certificate: Path) -> None:
    address = f"rediss://localhost:{port}"
    assert (await outcome(address)).startswith(f"{address} refuses: TLS failed (certificate not accepted: self")
    other_name = await outcome(f"rediss://127.0.0.1:{port}?ssl_ca_certs={certificate}")
    assert "IP address mismatch" in other_name


async def test_a_file_that_holds_no_certificate_is_named(port: int, tmp_path: Path) -> None:
    (tmp_path / "ca.pem").write_text("nothing")
    assert "TLS failed (no certificate or crl found)" in await outcome(
        f"rediss://localhost:{port}?ssl_ca_certs={tmp_path}/ca.pem"
    )


async def test_a_server_that_expects_tls_is_unreachable_without(port: int) -> None:
    assert (await outcome(f"redis://127.0.0.1:{port}")).startswith(f"cannot reach redis://127.0.0.1:{port} (")
