"""Sentences of the server about a plan, on a page in Chinese."""

from __future__ import annotations

from typing import Any

import pytest
from comfy_host.server import Server

from .test_page import BUDGET, GRAPH
from .test_routes import plan

pytest.importorskip("playwright.sync_api", reason="needs the package playwright")

pytestmark = [pytest.mark.browser, pytest.mark.slow]

APPROXIMATE = {"width": 128, "height": 128, "frames": 32, "precision": "fp32", "allow_approximate": True}


def test_what_is_approximate_is_said_in_the_pages_language(page: Any, server: Server) -> None:
    budgets = (f"{mib}MiB" for mib in range(2, 16))
    tight, told = next(
        (budget, said) for budget in budgets if (said := plan(server, **APPROXIMATE, budget=budget)["given_up"])
    )
    assert told[0]["text"].startswith("approximate: context windows of ")
    page.open(Comfy_Locale="zh")
    page.raw.evaluate(GRAPH, True)
    page.set(BUDGET, {**APPROXIMATE, "budget": tight})
    said = f"近似：上下文窗口，每个 {told[0]['values']['frames']} 帧"
    page.see("the windows in Chinese", f".i2v-live.fits .details >> text={said}")
