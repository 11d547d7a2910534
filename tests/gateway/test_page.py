"""The page at `/` in headless Chromium: chat, stop, queue position, workers, keyboard, phone."""

from __future__ import annotations

import re
import shutil
from collections.abc import AsyncIterator

import pytest
from playwright.async_api import Browser, Page, async_playwright, expect

from tests.gateway.gateways import Gateway, gateway
from tests.jobs.harness import Harness, wait_until
from tests.service.models import slow_model
from tests.service.serving import LONG_LEASE, serving
from worker.gateway.keys import ApiKeys, KeyEntry

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on PATH: `apt-get install chromium` brings it")
KEY = "sk-page-test"


@pytest.fixture
async def browser() -> AsyncIterator[Browser]:
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        await browser.close()


async def opened(browser: Browser, gate: Gateway, **options: object) -> Page:
    """The page of a gateway. A script error or a refused resource fails the test at its end."""
    page = await browser.new_page(**options)
    page.set_default_timeout(10_000)
    page.on("pageerror", lambda error: pytest.fail(str(error)))
    await page.goto(f"{gate.url}/")
    return page


async def ask(page: Page, text: str) -> None:
    await page.fill("#prompt", text)
    await page.click("#send")


async def test_an_answer_is_streamed_with_its_figures(browser: Browser, gate: Gateway) -> None:
    page = await opened(browser, gate)
    await expect(page.locator("#model option")).to_have_text(["echo"])
    await ask(page, "Bonjour, tout le monde!")
    figures = page.locator("li.assistant .figures")
    await expect(figures).to_have_text(
        re.compile(r"^\d+ tokens(, [\d.]+ tokens/s)?, first after \d+ ms, finish reason stop$")
    )
    await expect(page.locator("li.assistant .text")).to_contain_text("Bonjour, tout le monde!")
    await expect(page.locator("#stop")).to_be_hidden()


async def test_markup_in_an_answer_stays_text(browser: Browser, gate: Gateway) -> None:
    page = await opened(browser, gate)
    await ask(page, "<img src=x onerror=\"document.title='attacked'\">")
    await expect(page.locator("li.assistant .figures")).to_be_visible()
    await expect(page.locator("li.assistant .text")).to_contain_text("<img src=x")
    assert await page.locator("li img").count() == 0
    assert await page.title() == "worker gateway"


async def test_the_parameters_reach_the_job_and_last(browser: Browser, gate: Gateway) -> None:
    page = await opened(browser, gate)
    await page.click("#parameters summary")
    await page.fill("[name=max_tokens]", "3")
    await page.fill("[name=system]", "Be brief.")
    await ask(page, "one two three four five six seven")
    await expect(page.locator("li.assistant .figures")).to_contain_text("finish reason length")
    await expect(page.locator("li.assistant .figures")).to_contain_text("3 tokens")
    await page.reload()
    await page.click("#parameters summary")
    await expect(page.locator("[name=max_tokens]")).to_have_value("3")


async def test_stop_cancels_the_job(browser: Browser, harness: Harness) -> None:
    async with serving(harness, slow_model(0.05), lease=LONG_LEASE), gateway(harness) as gate:
        await gate.wait_for_model("echo")
        page = await opened(browser, gate)
        await ask(page, "a long prompt " * 50)
        await expect(page.locator("#progress")).to_contain_text("tokens")
        await page.click("#stop")
        await expect(page.locator("li.assistant .figures")).to_contain_text("stopped")

        async def queue_is_empty() -> bool:
            return await gate.client.queue_length() == 0

        await wait_until(queue_is_empty)
        assert gate.logged("cancelled")


async def test_a_waiting_job_shows_its_position(browser: Browser, harness: Harness) -> None:
    async with serving(harness, slow_model(0.05), lease=LONG_LEASE), gateway(harness) as gate:
        await gate.wait_for_model("echo")
        for _ in range(3):
            await gate.client.submit(prompt="another long prompt " * 40)
        page = await opened(browser, gate)
        await ask(page, "Hello")
        await expect(page.locator("#progress")).to_have_text("position 3 of 3 in the queue")
        await page.click("#stop")


async def test_an_error_is_shown_and_the_next_message_works(browser: Browser, gate: Gateway) -> None:
    page = await opened(browser, gate)
    await page.click("#parameters summary")
    await page.fill("[name=max_tokens]", "100000000")
    await ask(page, "Hello")
    await expect(page.locator("#notice")).to_contain_text("max_tokens")
    await page.fill("[name=max_tokens]", "")
    await ask(page, "Hello again")  # without the refused message, which the echo would begin with
    await expect(page.locator("li.assistant .text").nth(1)).to_contain_text("Hello again")
    await expect(page.locator("li.assistant .figures").nth(1)).to_contain_text("finish reason")
    await expect(page.locator("#notice")).to_be_hidden()


async def test_the_view_of_workers_and_queues_follows_them(browser: Browser, gate: Gateway) -> None:
    page = await opened(browser, gate)
    await page.locator("#tab-chat").press("ArrowRight")
    row = page.locator("#workers tbody tr")
    await expect(row).to_contain_text("ready")
    await expect(row).to_contain_text("echo")
    await expect(page.locator("#queues tbody td").nth(1)).to_have_text("0")
    await expect(page.locator("#view-chat")).to_be_hidden()


async def test_a_gateway_with_keys_shows_nothing_without_one(browser: Browser, harness: Harness, echo: object) -> None:
    keys = ApiKeys([KeyEntry(key=KEY, tenant="page")])
    async with gateway(harness, keys=keys) as gate:
        await gate.wait_for_model("echo")
        page = await opened(browser, gate)
        await expect(page.locator("#notice")).to_contain_text("key")
        await page.click("#tab-status")
        await expect(page.locator("#status-notice")).to_contain_text("key")
        await page.click("#tab-chat")
        await page.click("#parameters summary")
        await page.fill("[name=key]", KEY)
        await page.press("[name=key]", "Tab")
        await expect(page.locator("#model option")).to_have_text(["echo"])


async def test_the_api_key_is_not_saved(browser: Browser, gate: Gateway) -> None:
    page = await opened(browser, gate)
    await page.click("#parameters summary")
    await page.fill("[name=key]", KEY)
    await page.fill("[name=max_tokens]", "3")
    await page.press("[name=max_tokens]", "Tab")
    saved = await page.evaluate("JSON.stringify(localStorage)")
    assert "max_tokens" in saved
    assert KEY not in saved
    await page.reload()
    await page.click("#parameters summary")
    await expect(page.locator("[name=max_tokens]")).to_have_value("3")
    await expect(page.locator("[name=key]")).to_have_value("")


async def test_a_phone_needs_no_horizontal_scrolling(browser: Browser, gate: Gateway) -> None:
    page = await opened(browser, gate, viewport={"width": 360, "height": 640}, color_scheme="dark")
    await ask(page, "word " * 30 + "x" * 300)
    await expect(page.locator("li.assistant .figures")).to_be_visible()
    await page.click("#parameters summary")
    for tab in ("#tab-chat", "#tab-status"):
        await page.click(tab)
        assert await page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
        assert await page.evaluate("document.documentElement.scrollHeight <= window.innerHeight")
    await page.click("#tab-chat")
    await expect(page.locator("#send")).to_be_in_viewport()


async def test_every_control_has_a_name(browser: Browser, gate: Gateway) -> None:
    page = await opened(browser, gate)
    await page.click("#parameters summary")
    for control in await page.locator("button, input, select, textarea").all():
        name = await control.evaluate("each => (each.labels?.[0] ?? each).textContent.trim()")
        assert name, await control.evaluate("each => each.outerHTML")
