"""Untrusted text in the commands' output: never markup, readable at 80 columns and in a pipe."""

from __future__ import annotations

import json
import math
import re
import sys
from typing import Any

import msgpack
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.cells import cell_len

from tests.cli.conftest import Run, prepare
from tests.jobs.harness import ServerHarness
from tests.jobs.servers import Server
from worker.cli.console import plain, progress_bar
from worker.cli.table import print_table
from worker.errors import InvalidRequest
from worker.jobs.keys import dead_key, events_key, queue_key, state_key
from worker.jobs.protocol import decode_job
from worker.jobs.transport import Transport

NAMES = [
    "x[/y]",
    "Llama [v2]",
    "[bold]",
    "[/b] oops",
    "a\\[b]",
    "[link=file:///etc]",
    ":smile:",
    "\x1b[31mred",
    "模型",
    "\x9b31m\u202e",
]


async def dead_letter(harness: ServerHarness, payload: bytes) -> None:
    """Pass a payload through a worker's transport, which cannot read its job id."""
    transport: Transport = await harness.transport("w1")
    await harness.connect().enqueue("default", {"p": payload}, 10)
    claim = await transport.claim()
    assert claim is not None
    with pytest.raises(InvalidRequest) as caught:
        decode_job(claim.payload)
    await transport.dead_letter(claim, caught.value)


@pytest.mark.parametrize(
    "payload", [b'{"[/b] oops": 1}', b'{"\\u001b[31m": 1}', '{"x": "\udcff"}'.encode(errors="surrogateescape"), b"\xc1"]
)
def test_dead_letters_with_odd_payloads_are_listed_and_shown(server: Server, command: Run, payload: bytes) -> None:
    prepare(server, lambda harness: dead_letter(harness, payload))
    code, out, _ = command("dead", "ls")
    assert code == 0
    assert "\x1b" not in out
    code, out, _ = command("dead", "ls", "--json")
    letter = json.loads(out)
    code, shown, _ = command("dead", "show", letter["id"])
    assert (code, json.loads(shown)["id"]) == (0, letter["id"])
    assert "\x1b" not in shown
    assert command("dead", "rm", letter["id"])[0] == 0


@pytest.mark.parametrize(
    "fields",
    [
        {b"p": b""},
        {b"p": msgpack.packb({"job_id": "a", "temperature": float("nan")}), b"attempts": b"many"},
        {b"p": b"\x91" * 5000 + b"\x00"},
        {b"p": b'{"a":' + b"[" * 900 + b"]" * 900 + b"}"},
        {b"other": b"x"},
        {b"attempts": b"9" * 5000},
    ],
)
def test_entries_of_any_writer_are_listed_and_shown(server: Server, command: Run, fields: dict[bytes, bytes]) -> None:
    async def write(harness: ServerHarness) -> None:
        for key in (dead_key("default"), queue_key("default")):
            await harness.raw.xadd(key, fields, id="5-1")

    prepare(server, write)
    for arguments in (("dead", "ls"), ("jobs",), ("top", "--once")):
        assert command(*arguments)[0] == 0
    code, out, _ = command("dead", "show", "5-1")
    assert code == 0
    json.loads(out, parse_constant=pytest.fail)


async def failed_job(harness: ServerHarness, details: dict[Any, Any], ts_ms: object = 1) -> None:
    """Write the events of the job `a`: one error, with any details and time."""
    envelope = {"job_id": "a", "epoch": 1, "ts_ms": ts_ms, "worker_id": "w"}
    packed = msgpack.packb(envelope | {"code": "X", "message": "m", "details": details})
    await harness.raw.xadd(events_key("a"), {"type": "error", "p": packed}, id="1-0")
    await harness.raw.hset(state_key("a"), "state", "error")


@pytest.mark.parametrize("ts_ms", [2**60, -(2**60), float("nan"), "soon", None, b"x"])
def test_tail_shows_an_event_with_any_time_and_details(server: Server, command: Run, ts_ms: object) -> None:
    prepare(server, lambda harness: failed_job(harness, {"d": b"\x9b"}, ts_ms))
    code, out, _ = command("tail", "a")
    assert (code, out[:7]) == (0, "?  a  1")
    code, out, _ = command("tail", "a", "--json")
    assert json.loads(out)["code"] == "X"


@pytest.mark.parametrize(
    ("details", "shown"),
    [
        ({b"x": 1, "y": [{msgpack.ExtType(1, b"z"): b"z"}]}, {"b'x'": 1, "y": [{"[1, b'z']": "b'z'"}]}),
        ({"x": math.nan, "y": [math.inf]}, {"x": None, "y": [sys.float_info.max]}),
        ({math.nan: {None: 1, 2: 3}}, {"null": {"null": 1, "2": 3}}),
    ],
)
def test_an_event_with_keys_and_numbers_that_json_lacks_is_shown(
    server: Server, command: Run, details: dict[object, object], shown: dict[str, object]
) -> None:
    prepare(server, lambda harness: failed_job(harness, details))
    code, out, _ = command("tail", "a", "--json")
    assert (code, json.loads(out, parse_constant=pytest.fail)["details"]) == (0, shown)
    code, out, _ = command("tail", "a")
    assert (code, f"details={json.dumps(shown)}" in out) == (0, True)


@pytest.mark.parametrize(("key", "levels"), [("x", 1010), (b"x", 500)])
def test_an_event_nested_deeper_than_the_recursion_limit_is_cut(
    server: Server, command: Run, key: str | bytes, levels: int
) -> None:
    details: Any = 1
    for _ in range(levels):
        details = {key: details}
    prepare(server, lambda harness: failed_job(harness, details))
    code, out, _ = command("tail", "a", "--json")
    shown, depth = json.loads(out)["details"], 0
    while isinstance(shown, dict):
        (shown,), depth = shown.values(), depth + 1
    assert (code, shown, depth) == (0, "...", 99)
    code, out, _ = command("tail", "a")
    assert (code, out.count('"...')) == (0, 1)


@pytest.mark.parametrize("malformed", ["x", "-", "+", "1-2-3", "[/b]", "99999999999999999999-0", ""])
def test_a_malformed_id_of_a_dead_letter_is_one_sentence(server: Server, command: Run, malformed: str) -> None:
    prepare(server, lambda harness: dead_letter(harness, b"\xc1"))
    for action in ("show", "retry", "rm"):
        code, out, err = command("dead", action, "--", malformed)
        assert (code, out, err.count("\n")) == (1, "", 1)
        assert err.startswith("worker: NOT_FOUND: no dead letter")


@pytest.mark.parametrize("name", NAMES)
def test_a_model_s_name_is_shown_as_it_is(server: Server, command: Run, name: str) -> None:
    async def beat(harness: ServerHarness) -> None:
        transport = await harness.transport("w1")
        await transport.registration.heartbeat({"state": "ready", "model": name, "name": name, "queue": name})

    prepare(server, beat)
    code, out, _ = command("workers")
    assert code == 0
    assert plain(name) in out
    for arguments in (("workers", "--json"), ("top", "--once")):
        code, out, _ = command(*arguments)
        shown = json.loads(out)
        assert (shown["workers"][0] if arguments[0] == "top" else shown)["model"] == name
        assert out.rstrip("\n").isprintable()
    code, _, err = command("drain", "[/b]")
    assert (code, "[/b]" in err) == (1, True)


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.lists(st.text(), min_size=3, max_size=3), min_size=1, max_size=4), st.sampled_from(["", "20", "80"]))
def test_any_text_is_printed_as_text(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], rows: list[list[str]], columns: str
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    print_table([dict(zip("abc", row, strict=True)) for row in rows], required=1 if columns == "20" else 3)
    out = capsys.readouterr().out
    assert all(char.isprintable() or char == "\n" for char in out)
    if columns == "20":
        assert max(map(cell_len, out.splitlines())) <= 20
    else:
        assert sorted(without_spaces(out)) == sorted(
            without_spaces("abc" + "".join(plain("".join(row)) for row in rows))
        )


def without_spaces(text: str) -> str:
    return "".join(text.split())


def test_a_folded_column_loses_nothing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    reason = "prompt: exactly one of prompt, messages and prompt_tokens; [/b] oops: unknown field"
    print_table([{"id": "1" * 15, "job_id": "a" * 32, "reason": reason, "attempts": 3}], required=3)
    lines = capsys.readouterr().out.splitlines()
    assert " ".join(line[51:] for line in lines[1:]) == reason
    assert max(map(len, lines)) <= 80


def test_a_progress_bar_has_any_title(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with progress_bar("pulling x[/y]") as progress:
        progress(1, 2)


def test_the_list_of_jobs_is_readable_at_80_columns(
    server: Server, command: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fill(harness: ServerHarness) -> None:
        client = harness.client()
        for _ in range(3):
            await client.submit(prompt="hello")
        await (await harness.transport("a-host.example.org-12345-abcdef")).claim()

    prepare(server, fill)
    monkeypatch.setenv("COLUMNS", "80")
    code, out, err = command("jobs")
    lines = out.splitlines()
    assert (code, len(lines)) == (0, 4)
    assert max(map(len, lines)) <= 80
    assert all(re.match(r"[0-9a-f]{32}  (running|waiting|orphaned)", line) for line in lines[1:])
    assert "entry" in err
    monkeypatch.delenv("COLUMNS")
    lines = command("jobs")[1].splitlines()
    assert all(re.search(r"\d+-\d+ *$", line) for line in lines[1:])


def test_a_job_that_was_not_renewed_for_a_lease_is_orphaned(
    server: Server, command: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fill(harness: ServerHarness) -> None:
        await harness.client().submit(job_id="a", prompt="hello")
        claim = await (await harness.transport("w1")).claim()
        assert claim is not None
        assert await harness.connect().give_back("default", "w1", claim.entry_id, 90_000, 1)

    prepare(server, fill)
    for lease_s, state in ((60, "orphaned"), (6000, "running")):
        monkeypatch.setenv("WORKER_LEASE__LEASE_S", str(lease_s))
        assert json.loads(command("jobs", "--json")[1])["state"] == state


def test_lists_say_how_many_of_how_many_they_show(server: Server, command: Run) -> None:
    async def fill(harness: ServerHarness) -> None:
        for number in range(1205):
            await harness.raw.xadd(queue_key("default"), {"p": b"{}"}, id=f"1-{number + 1}")
        for number in range(101):
            await harness.raw.xadd(dead_key("default"), {"p": b"{}"}, id=f"1-{number + 1}")

    prepare(server, fill)
    assert command("jobs")[1].splitlines()[-1] == "100 of 1,205 jobs, the oldest; --count N shows more"
    _, out, err = command("jobs", "--json")
    assert (len(out.splitlines()), "100 of 1,205" in err) == (100, True)
    assert "of" not in command("jobs", "--count", 2000)[1].splitlines()[-1]
    assert command("dead", "ls")[1].splitlines()[-1].startswith("100 of 101 dead letters")


def test_the_help_of_top_names_the_streams_that_must_be_a_terminal(
    command: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    code, out, _ = command("top", "--help")
    assert code == 0
    assert "2>FILE" in out
