"""A gateway and a worker whose model answers as a function of the prompt says."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Any

from tests.gateway.gateways import Gateway, gateway
from tests.gateway.scripted import scripted_model
from tests.jobs.harness import Harness
from tests.service.serving import LONG_LEASE, serving
from worker.gateway.keys import ApiKeys, KeyEntry

Script = Callable[[str], str]


@contextlib.asynccontextmanager
async def scripted_worker(
    harness: Harness, script: Script, *, step_s: float = 0.0, slots: int = 8
) -> AsyncIterator[list[str]]:
    """A worker of the model `scripted`; yields the prompts that it has begun to answer."""
    prompts: list[str] = []

    def recorded(prompt: str) -> str:
        prompts.append(prompt)
        return script(prompt)

    async with serving(harness, scripted_model(recorded, step_s=step_s, slots=slots), lease=LONG_LEASE):
        yield prompts


@contextlib.asynccontextmanager
async def stack(
    harness: Harness,
    script: Script,
    *,
    step_s: float = 0.0,
    slots: int = 8,
    tenants: tuple[str, ...] = (),
    **section: Any,
) -> AsyncIterator[tuple[Gateway, list[str]]]:
    """Such a worker and a gateway, which has keys for `tenants`, if any."""
    async with (
        scripted_worker(harness, script, step_s=step_s, slots=slots) as prompts,
        gateway(harness, keys=keys_of(*tenants), **section) as running,
    ):
        await running.wait_for_model("scripted")
        yield running, prompts


def keys_of(*tenants: str, **limits: Any) -> ApiKeys | None:
    """One key for each tenant, `key-of-TENANT`."""
    entries = [KeyEntry(key=f"key-of-{tenant}", tenant=tenant, **limits) for tenant in tenants]
    return ApiKeys(entries) if entries else None


def last_turn(prompt: str) -> tuple[str, str]:
    """Role and text of the last message in a prompt of the template qwen3."""
    role, _, text = prompt.rpartition("<|im_end|>")[0].rpartition("<|im_start|>")[2].partition("\n")
    response = text.partition("<tool_response>")[2].partition("</tool_response>")[0]
    return ("tool", response.strip()) if response else (role, text)
