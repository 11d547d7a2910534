"""`/v1/files` with the openai package."""

from __future__ import annotations

import httpx
import openai
import pytest

from tests.gateway.gateways import gateway
from tests.gateway.stack import keys_of
from worker.gateway.file_store import CHUNK_BYTES, FileStore


async def test_a_file_is_returned_as_it_was_uploaded(harness):
    content = bytes(range(256)) * (2 * CHUNK_BYTES // 256) + b"rest"
    async with gateway(harness) as gate, gate.openai() as client:
        file = await client.files.create(file=("in.jsonl", content), purpose="batch")
        described = await client.files.retrieve(file.id)
        returned = await client.files.content(file.id)

    assert (file.bytes, file.filename, file.purpose) == (len(content), "in.jsonl", "batch")
    assert described == file
    assert returned.content == content


async def test_files_are_listed_in_pages_the_newest_first(harness):
    async with gateway(harness) as gate, gate.openai() as client:
        files = [await client.files.create(file=(f"{n}", b"x"), purpose="batch") for n in range(3)]
        listed = [file.id async for file in client.files.list(limit=2)]
        ascending = [file.id async for file in client.files.list(limit=2, order="asc")]
        outputs = [file.id async for file in client.files.list(purpose="batch_output")]

    assert listed == [file.id for file in files[::-1]]
    assert ascending == listed[::-1]
    assert outputs == []


async def test_a_deleted_file_is_gone(harness):
    async with gateway(harness) as gate, gate.openai() as client:
        file = await client.files.create(file=("a", b"x"), purpose="batch")
        assert (await client.files.delete(file.id)).deleted
        with pytest.raises(openai.NotFoundError):
            await client.files.retrieve(file.id)
        assert [each async for each in client.files.list()] == []
    assert not [key for key in await harness.keys() if "{file:" in key]


async def test_every_key_of_a_file_expires(harness):
    async with gateway(harness) as gate, gate.openai() as client:
        expires = {"anchor": "created_at", "seconds": 3600}
        file = await client.files.create(file=("a", b"x"), purpose="batch", expires_after=expires)

    assert file.expires_at == file.created_at + 3600
    ttls = [ttl for key, ttl in (await harness.keys()).items() if "{file:" in key]
    assert len(ttls) == 2
    assert all(0 < ttl <= 3_600_000 for ttl in ttls)


async def test_files_of_other_tenants_are_not_found(harness):
    async with gateway(harness, keys=keys_of("one", "two")) as gate:
        one, two = gate.openai(api_key="key-of-one"), gate.openai(api_key="key-of-two")
        async with one, two:
            file = await one.files.create(file=("a", b"x"), purpose="batch")
            with pytest.raises(openai.NotFoundError):
                await two.files.content(file.id)
            assert [each async for each in two.files.list()] == []


async def test_a_large_file_is_refused(harness):
    async with gateway(harness, max_file_bytes=1024) as gate, gate.openai() as client:
        with pytest.raises(openai.APIStatusError) as raised:
            await client.files.create(file=("a", b"x" * 200_000), purpose="batch")

    assert raised.value.status_code == 413


async def test_a_file_without_a_use_is_refused_by_name(harness):
    async with gateway(harness) as gate, gate.openai() as client:
        with pytest.raises(openai.BadRequestError) as raised:
            await client.files.create(file=("a", b"x"), purpose="vision")

    assert raised.value.param == "purpose"


@pytest.mark.parametrize(
    ("form", "param"),
    [
        ({"files": {"file": b"x"}, "data": {"purpose": "batch", "frob": "1"}}, "frob"),
        ({"data": {"purpose": "batch"}}, "file"),
        (
            {"files": {"file": b"x"}, "data": {"purpose": "batch", "expires_after[seconds]": "1"}},
            "expires_after.seconds",
        ),
    ],
)
async def test_a_malformed_form_is_refused_by_name(harness, form, param):
    async with gateway(harness) as gate, httpx.AsyncClient() as client:
        response = await client.post(f"{gate.url}/v1/files", **form)

    assert response.status_code == 400
    assert response.json()["error"]["param"] == param


async def test_lines_may_cross_chunks(harness):
    store = FileStore(harness.connect().documents, 3600)
    lines = [bytes([65 + n % 26]) * (CHUNK_BYTES // 3) for n in range(10)]

    async def content():
        yield b"\n".join(lines)

    file = await store.write(content(), tenant="", filename="f", purpose="batch")

    assert file.chunks > 3
    assert [line async for line in store.lines(file)] == lines


async def test_an_upload_without_a_length_is_a_mistake_of_the_client(harness):
    async def parts():
        yield b"x"

    async with gateway(harness) as gate:
        response = await gate.http().post("/v1/files", content=parts())
    error = response.json()["error"]
    assert (response.status_code, error["type"], error["code"]) == (411, "invalid_request_error", "length_required")
