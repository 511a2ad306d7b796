"""The live plan on the real page, in a browser: the host's own and the newest, on the canvas and in Nodes 2.0."""

from __future__ import annotations

import json
from typing import Any

import pytest

pytest.importorskip("playwright.sync_api", reason="needs the package playwright")

pytestmark = [pytest.mark.browser, pytest.mark.slow]

# Puts a loader with the tiny model and a VRAM Budget into an empty graph; `connected` says whether with a link.
GRAPH = """connected => {
  const [loader, budget] = ["I2VLoader", "I2VVRAMBudget"].map((type) => LiteGraph.createNode(type));
  loader.pos = [80, 80];
  budget.pos = [420, 80];
  app.graph.add(loader);
  app.graph.add(budget);
  loader.widgets[0].value = "tiny";
  if (connected) loader.connect(0, budget, 0);
  app.canvas.ds.reset();
}"""
BUDGET = "I2VVRAMBudget"
SMALL = {"width": 64, "height": 64, "frames": 4, "budget": "6MiB", "precision": "fp32"}
LARGE = {**SMALL, "width": 256, "height": 256, "frames": 32}


@pytest.fixture
def panel(page: Any) -> Any:
    """The page with the two nodes in it, connected."""
    page.raw.evaluate(GRAPH, True)
    return page


def test_it_follows_the_widgets_and_its_buttons_mend_what_does_not_fit(panel: Any) -> None:
    """With the keyboard alone, from the verdict on."""
    panel.set(BUDGET, SMALL)
    panel.see("a plan that fits", ".i2v-live.fits")
    panel.set(BUDGET, LARGE)
    panel.see("buttons for what would fit", ".i2v-live.refused button")
    assert "Does not fit: sample needs" in panel.raw.text_content(".i2v-live .verdict")
    labels = panel.raw.locator(".i2v-live .bar").evaluate_all("bars => bars.map((bar) => bar.ariaLabel)")
    assert len(labels) == 3
    assert all(label.startswith("weights ") and label.endswith((" free", " over the limit")) for label in labels)
    panel.raw.focus(".i2v-live .verdict")
    panel.raw.keyboard.press("Tab")
    assert panel.raw.evaluate("document.activeElement.tagName") == "BUTTON"
    frames = int(panel.raw.evaluate("document.activeElement.textContent").split()[0])
    panel.raw.keyboard.press("Enter")
    panel.see("a plan that fits", ".i2v-live.fits")
    assert panel.value(BUDGET, "frames") == frames < LARGE["frames"]


def test_an_older_answer_does_not_take_the_place_of_a_newer_one(panel: Any) -> None:
    held: list[Any] = []

    def hold_first(route: Any) -> None:
        if json.loads(route.request.post_data)["width"] == LARGE["width"] and not held:
            held.append(route)
        else:
            route.continue_()

    panel.raw.route("**/i2v_budget/plan", hold_first)
    with panel.raw.expect_request(lambda request: '"width":256' in (request.post_data or "")):
        panel.set(BUDGET, LARGE)
    panel.set(BUDGET, SMALL)
    panel.see("a plan that fits", ".i2v-live.fits")
    assert held[0].request.failure, "the page still waits for what it asks no more"
    assert panel.raw.locator(".i2v-live.fits").count() == 1
    panel.raw.unroute("**/i2v_budget/plan")


def test_it_asks_for_a_model_where_there_is_none(page: Any) -> None:
    page.raw.evaluate(GRAPH, False)
    page.see("what to do", "text=Connect I2V Loader to see whether it fits.")


def test_it_says_what_is_wrong(panel: Any) -> None:
    panel.set(BUDGET, {**SMALL, "budget": "banana"})
    panel.see("a refusal", ".i2v-live.refused")
    assert "'banana' is not an amount of memory" in panel.raw.text_content(".i2v-live .verdict")


def test_it_speaks_the_pages_language(page: Any) -> None:
    page.open(Comfy_Locale="zh")
    page.raw.evaluate(GRAPH, True)
    page.set(BUDGET, SMALL)
    page.see("the verdict in Chinese", ".i2v-live.fits .verdict >> text=放得下")
    assert page.raw.locator(".i2v-live .legend span").all_text_contents()[:3] == ["权重", "激活值", "余量"]
    page.set(BUDGET, LARGE)
    page.see("buttons in Chinese", ".i2v-live button >> text=帧")


@pytest.mark.parametrize("theme", ["dark", "light"])
def test_its_text_stands_out_in_each_theme(page: Any, theme: str) -> None:
    page.open(Comfy_ColorPalette=theme)
    page.raw.evaluate(GRAPH, True)
    page.set(BUDGET, SMALL)
    page.see("a plan that fits", ".i2v-live.fits")
    colour = page.raw.evaluate("getComputedStyle(document.querySelector('.i2v-live')).color")
    channels = [int(it) for it in colour[colour.index("(") + 1 : -1].split(",")[:3]]
    assert min(channels) > 180 if theme == "dark" else max(channels) < 80


def test_it_is_not_saved_with_the_workflow(panel: Any) -> None:
    panel.set(BUDGET, SMALL)
    panel.see("a plan that fits", ".i2v-live.fits")
    saved = panel.raw.evaluate("key => i2v.node(key).serialize().widgets_values", BUDGET)
    assert saved == [64, 64, 4, True, "fp32", "6MiB", 0, False, "this machine"]
