"""The live plan on the real page, in a browser: on the classic canvas and in Nodes 2.0."""

from __future__ import annotations

import json
import shutil
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from comfy_host.server import Server

playwright = pytest.importorskip("playwright.sync_api", reason="needs the package playwright")

pytestmark = [pytest.mark.browser, pytest.mark.slow]

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-sync"]
# The host puts a workflow of its own into the page once all nodes are there.
READY = "window.app?.extensionManager && app.vueAppReady && app.graph.nodes.length > 0"
PATIENCE_MS = 120_000  # the first plan reads the model, which takes long on a busy machine

# Puts a loader with the tiny model and a VRAM Budget into an empty graph; `connected` says whether with a link.
GRAPH = """connected => {
  app.graph.clear();
  const [loader, budget] = ["I2VLoader", "I2VVRAMBudget"].map((type) => LiteGraph.createNode(type));
  loader.pos = [80, 80];
  budget.pos = [420, 80];
  app.graph.add(loader);
  app.graph.add(budget);
  loader.widgets[0].value = "tiny";
  if (connected) loader.connect(0, budget, 0);
  app.canvas.ds.reset();
  window.budget = budget;
}"""
SET = "values => budget.widgets.filter(({name}) => name in values).forEach((it) => (it.value = values[it.name]))"
GET = "name => budget.widgets.find((it) => it.name === name).value"
SMALL = {"width": 64, "height": 64, "frames": 4, "budget": "6MiB", "precision": "fp32"}
LARGE = {**SMALL, "width": 256, "height": 256, "frames": 32}

OpenPage = Callable[..., Any]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as tool:
        own = Path(tool.chromium.executable_path)
        found = str(own) if own.exists() else next(filter(None, map(shutil.which, BROWSERS)), None)
        if found is None:
            pytest.skip("needs Chromium")
        running = tool.chromium.launch(executable_path=found, args=FLAGS)
        yield running
        running.close()


@pytest.fixture
def open_page(browser: Any, server: Server) -> Iterator[OpenPage]:
    """Opens the page with `nodes_2` or the classic canvas, in a theme, with the two nodes in it."""
    pages: list[Any] = []

    def open_it(*, nodes_2: bool, theme: str = "dark", connected: bool = True) -> Any:
        settings = {
            "Comfy.TutorialCompleted": True,
            "Comfy.Workflow.Persist": False,
            "Comfy.VueNodes.Enabled": nodes_2,
            "Comfy.ColorPalette": theme,
        }
        urllib.request.urlopen(
            urllib.request.Request(f"{server.url}/settings", json.dumps(settings).encode(), method="POST")
        ).close()
        page = browser.new_page(viewport={"width": 1300, "height": 900})
        pages.append(page)
        page.set_default_timeout(PATIENCE_MS)
        page.goto(server.url)
        page.wait_for_function(READY)
        page.evaluate(GRAPH, connected)
        return page

    yield open_it
    for page in pages:
        page.close()


both = pytest.mark.parametrize("nodes_2", [False, True], ids=["classic", "Nodes 2.0"])


@both
def test_it_follows_the_widgets_and_its_buttons_mend_what_does_not_fit(open_page: OpenPage, nodes_2: bool) -> None:
    """With the keyboard alone, from the verdict on."""
    page = open_page(nodes_2=nodes_2)
    page.evaluate(SET, SMALL)
    page.wait_for_selector(".i2v-live.fits")
    page.evaluate(SET, LARGE)
    page.wait_for_selector(".i2v-live.refused button")
    assert "Does not fit: sample needs" in page.text_content(".i2v-live .verdict")
    labels = page.locator(".i2v-live .bar").evaluate_all("bars => bars.map((bar) => bar.ariaLabel)")
    assert len(labels) == 3
    assert all(label.startswith("weights ") and label.endswith((" free", " too much")) for label in labels)
    page.focus(".i2v-live .verdict")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.tagName") == "BUTTON"
    frames = int(page.evaluate("document.activeElement.textContent").split()[0])
    page.keyboard.press("Enter")
    page.wait_for_selector(".i2v-live.fits")
    assert page.evaluate(GET, "frames") == frames < LARGE["frames"]


def test_an_older_answer_does_not_take_the_place_of_a_newer_one(open_page: OpenPage) -> None:
    page = open_page(nodes_2=False)
    page.route("**/i2v_budget/plan", lambda route: _slowly(page, route))
    page.evaluate(SET, LARGE)
    page.wait_for_timeout(200)  # asked, and not yet answered
    page.evaluate(SET, SMALL)
    page.wait_for_selector(".i2v-live.fits")
    page.wait_for_timeout(1500)
    assert page.locator(".i2v-live.fits").count() == 1


def _slowly(page: Any, route: Any) -> None:
    if json.loads(route.request.post_data)["width"] == LARGE["width"]:
        page.wait_for_timeout(1000)
    route.continue_()


@both
def test_it_says_what_is_wrong(open_page: OpenPage, nodes_2: bool) -> None:
    page = open_page(nodes_2=nodes_2, connected=False)
    page.wait_for_selector("text=Connect I2V Loader to see whether it fits.")
    page = open_page(nodes_2=nodes_2)
    page.evaluate(SET, {**SMALL, "budget": "banana"})
    page.wait_for_selector(".i2v-live.refused")
    assert "'banana' is not an amount of memory" in page.text_content(".i2v-live .verdict")


@both
@pytest.mark.parametrize("theme", ["dark", "light"])
def test_its_text_stands_out_in_each_theme(open_page: OpenPage, nodes_2: bool, theme: str) -> None:
    page = open_page(nodes_2=nodes_2, theme=theme)
    page.evaluate(SET, SMALL)
    page.wait_for_selector(".i2v-live.fits")
    colour = page.evaluate("getComputedStyle(document.querySelector('.i2v-live')).color")
    channels = [int(it) for it in colour[colour.index("(") + 1 : -1].split(",")[:3]]
    assert min(channels) > 180 if theme == "dark" else max(channels) < 80


def test_it_is_not_saved_with_the_workflow(open_page: OpenPage) -> None:
    page = open_page(nodes_2=False)
    page.evaluate(SET, SMALL)
    page.wait_for_selector(".i2v-live.fits")
    saved = page.evaluate("budget.serialize().widgets_values")
    assert saved == [64, 64, 4, True, "fp32", "6MiB", 0, False, "this machine"]
