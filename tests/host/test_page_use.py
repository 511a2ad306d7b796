"""Use of the real page in a browser, on the host's own page and the newest, classic and in Nodes 2.0."""

from __future__ import annotations

from itertools import count
from typing import Any

import pytest
from comfy_host.setup import PACK
from PIL import Image

pytest.importorskip("playwright.sync_api", reason="needs the package playwright")

pytestmark = [pytest.mark.browser, pytest.mark.slow]

WORKFLOWS = PACK / "workflows"
DEMO = WORKFLOWS / "i2v_demo.json"
BUDGET, SAMPLER, SAVE = "I2VVRAMBudget", "I2VChunkedSampler", "SaveVideo"
REFUSED = {"width": 2048, "height": 2048, "budget": "64MiB"}
seeds = count(1000)
"""Another for each run: what is cached is not run."""

# What the page shows of a preview: on the canvas a picture of the node, in Nodes 2.0 an element in it.
SHOWN = """(key) => {
  const node = i2v.node(key);
  const drawn = document.querySelector(`[data-node-id="${node.id}"] img[src^="blob:"]`);
  const shown = LiteGraph.vueNodesMode ? drawn : node.imgs?.[0];
  return shown?.naturalWidth ? shown.src : null;
}"""
AMOUNTS = "[...document.querySelectorAll('.i2v-live .amount')].map((it) => it.textContent).join()"
OWN_NODES = """Object.values(LiteGraph.registered_node_types)
  .map(({ nodeData }) => nodeData)
  .filter((data) => data?.python_module === 'custom_nodes.i2v_budget')
  .map(({ name, display_name }) => [name, display_name])"""
PLAYS = "[...document.querySelectorAll('video')].map((it) => it.readyState >= 2 && [it.videoWidth, it.videoHeight])[0]"


def open_demo(page: Any, **sampler: Any) -> None:
    page.drop(DEMO)
    page.set(SAMPLER, {"seed": next(seeds), **sampler})


def preview(page: Any) -> str:
    """The first bytes of what came last to be shown on the sampler, once something is."""
    page.wait("a preview on the sampler", SHOWN, SAMPLER)
    return page.wait("its bytes", "i2v.previewStart")


def test_a_dropped_workflow_opens_and_its_plan_follows_the_widgets(page: Any) -> None:
    page.drop(DEMO)
    page.see("a plan that fits", ".i2v-live.fits")
    before = page.raw.evaluate(AMOUNTS)
    page.set(BUDGET, {"frames": 32})
    page.wait("other amounts", f"before => !!{AMOUNTS} && {AMOUNTS} !== before", before)
    page.set(BUDGET, REFUSED)
    page.see("a refusal with buttons", ".i2v-live.refused button")


def test_a_cfg_between_is_kept(page: Any) -> None:
    """1.25, which suits the demo model best, is finer than a tenth."""
    page.drop(DEMO)
    assert page.value(SAMPLER, "cfg") == 1.25
    page.set(SAMPLER, {"cfg": 1.25})
    assert page.value(SAMPLER, "cfg") == 1.25


def test_every_node_is_found_by_its_name(page: Any, request: pytest.FixtureRequest) -> None:
    nodes = page.raw.evaluate(OWN_NODES)
    assert len(nodes) >= 9
    _host, nodes_2 = request.node.callspec.params["loaded_page"]
    # The search box is the same in Nodes 2.0: some nodes show that it adds them there too.
    for kind, name in nodes[::4] if nodes_2 else nodes:
        page.add_by_search(name)
        assert page.raw.evaluate("app.graph.nodes.map((node) => node.type)") == [kind]
        page.raw.evaluate("app.graph.clear()")


def test_a_run_shows_a_moving_preview_its_figures_and_the_video(page: Any) -> None:
    open_demo(page)
    page.run()
    start = preview(page)
    assert start.startswith("RIFF")
    assert "WEBP" in start
    assert "ANIM" in start, "a still"
    assert page.end() == "execution_success"
    page.fit(SAVE)
    assert page.wait("a video on the node", PLAYS) == [96, 96]
    said = page.raw.evaluate("key => i2v.widget(key, 'i2v_report').value", SAMPLER)
    assert "predicted" in said
    assert "measured" in said
    assert page.wait("the picture of the memory", "i2v.node('I2VMemoryReport').imgs?.[0]?.naturalWidth") > 400


def test_what_is_wrong_is_said_in_the_nodes_own_words(page: Any) -> None:
    open_demo(page)
    page.set(BUDGET, {"budget": "banana"})
    page.run()
    assert page.end() == "execution_error"
    page.see("an error", "[data-testid=error-overlay] >> text=VRAM Budget failed")
    page.raw.click("[data-testid=error-overlay-see-errors]")
    page.see("what the node says", r"text=/'banana' is not an amount of memory\. Remedy: write for example 6, 6GiB/")


def test_a_run_can_be_cancelled_and_the_next_one_runs(page: Any) -> None:
    open_demo(page, steps=900)
    page.run()
    preview(page)
    page.raw.click('button[aria-label="Cancel current run"]')
    assert page.end() == "execution_interrupted"
    page.set(SAMPLER, {"steps": 1})
    page.run()
    assert page.end() == "execution_success"


@pytest.mark.parametrize("node", [BUDGET, SAMPLER])
def test_a_node_has_its_help_page(page: Any, node: str) -> None:
    page.drop(DEMO)
    page.select(node)
    page.see("the info button", "[data-testid=info-button]").click()
    title = {BUDGET: "VRAM Budget", SAMPLER: "Chunked Sampler"}[node]
    page.see("the help page", f'h1:has-text("{title}")')
    page.see("its table of inputs", "th:has-text('What it is')")


def test_the_template_browser_shows_our_workflows_with_pictures_and_opens_one(page: Any) -> None:
    cards = page.templates("i2v_budget")
    for file in sorted(WORKFLOWS.glob("*.json")):
        card = f"[data-testid=template-workflow-{file.stem}]"
        page.see(f"the card of {file.stem}", card).scroll_into_view_if_needed()
        shown = page.wait("its picture", "card => document.querySelector(`${card} img`)?.naturalWidth", card)
        with Image.open(file.with_suffix(".jpg")) as picture:
            assert shown == picture.width
    assert cards.count() == len(list(WORKFLOWS.glob("*.json")))
    page.raw.click("[data-testid=template-workflow-i2v_demo]")
    page.wait("the demo's nodes", "!!i2v.node('I2VChunkedSampler')")
    page.see("its plan", ".i2v-live.fits")
