"""What the page's files allow a browser to do."""

from __future__ import annotations

import pytest

from tests.gateway.gateways import Gateway


@pytest.mark.parametrize("path", ["/", "/static/app.js", "/static/index.html"])
async def test_the_page_loads_and_sends_to_its_own_origin_only_and_is_shown_in_no_frame(
    gate: Gateway, path: str
) -> None:
    headers = (await gate.http().get(path)).headers
    policy = set(headers["content-security-policy"].split("; "))
    assert {"default-src 'self'", "frame-ancestors 'none'", "base-uri 'none'", "form-action 'none'"} <= policy
    assert "unsafe" not in headers["content-security-policy"]
    assert headers["x-content-type-options"] == "nosniff"
