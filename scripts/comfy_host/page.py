"""Drives ComfyUI's page in a headless browser: opens it, loads and runs workflows, takes screenshots.

Used by the browser tests and for the images in the docs. Waits are for conditions, never for a fixed time; if one is
not met, the error says what the page showed instead.
"""

from __future__ import annotations

import json
import shutil
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from playwright import sync_api as playwright

from .errors import HostError

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = ("--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-sync")
PATIENCE_MS = 300_000
DOUBLE_CLICKS, DOUBLE_CLICK_MS = 12, 4_000
"""How often to try and how long to wait: a busy page may treat a double click as two clicks."""

SETTINGS = {
    "Comfy.TutorialCompleted": True,
    "Comfy.Workflow.Persist": False,
    "Comfy.NodeSearchBoxImpl": "default",
    "Comfy.Pointer.DoubleClickTime": 1000,  # a busy page handles clicks late
    "Comfy.Execution.PreviewMethod": "auto",
    "Comfy.Minimap.Visible": False,
    "Comfy.Graph.CanvasInfo": False,
    "Comfy.RightSidePanel.IsOpen": False,
    "Comfy.ColorPalette": "dark",
    "Comfy.Locale": "en",
}

# The page loads a default workflow once all nodes are registered, and shows a splash screen until then.
READY = """window.app?.extensionManager && app.vueAppReady && app.graph.nodes.length > 0
  && !document.querySelector('.p-blockui-mask, .p-overlay-mask, #splash-loader')"""
HELPERS = """window.i2v = {
  ends: ['execution_success', 'execution_error', 'execution_interrupted'],
  events: [],
  previewStart: '',
  node: (key) => app.graph.nodes.find((node) => node.type === key || node.id === key),
  widget: (key, name) => i2v.node(key).widgets.find((widget) => widget.name === name),
};"""
LISTEN = """async () => {
  const { api } = await import('/scripts/api.js');
  for (const kind of ['execution_start', ...i2v.ends])
    api.addEventListener(kind, ({ detail }) => i2v.events.push({ kind, detail }));
  api.addEventListener('b_preview', async ({ detail }) => {
    i2v.previewStart = new TextDecoder('latin1').decode(await detail.slice(0, 64).arrayBuffer());
  });
}"""
IDLE = """async () => {
  const post = (path, body) => fetch(path, { method: 'POST', body: JSON.stringify(body) });
  await post('/queue', { clear: true });
  for (;;) {
    const { queue_running, queue_pending } = await fetch('/queue').then((answer) => answer.json());
    if (!queue_running.length && !queue_pending.length) return;
    await post('/interrupt', {});
  }
}"""
DROP = """([name, text]) => {
  const carried = new DataTransfer();
  carried.items.add(new File([text], name, { type: 'application/json' }));
  const [clientX, clientY] = [innerWidth / 2, innerHeight / 2];
  for (const kind of ['dragover', 'drop'])
    document.querySelector('#graph-canvas').dispatchEvent(
      new DragEvent(kind, { dataTransfer: carried, bubbles: true, cancelable: true, clientX, clientY }));
}"""
SET = """([key, values]) => {
  for (const [name, value] of Object.entries(values)) {
    const widget = i2v.widget(key, name);
    widget.value = value;
    widget.callback?.(value, app.canvas, i2v.node(key));
  }
}"""
# Fits the nodes and a margin into the free part of the window; returns their rectangle.
FIT = """([keys, left, top]) => {
  const nodes = keys.length ? keys.map(i2v.node) : app.graph.nodes;
  const boxes = nodes.map(({ pos, size }) => ({ x: pos[0], y: pos[1] - 30, r: pos[0] + size[0], b: pos[1] + size[1] }));
  const [x, y] = [Math.min(...boxes.map((box) => box.x)), Math.min(...boxes.map((box) => box.y))];
  const [r, b] = [Math.max(...boxes.map((box) => box.r)), Math.max(...boxes.map((box) => box.b))];
  const scale = Math.min(1, (innerWidth - left - 16) / (r - x), (innerHeight - top - 16) / (b - y));
  app.canvas.ds.scale = scale;
  app.canvas.ds.offset = [left / scale - x, top / scale - y];
  app.canvas.setDirty(true, true);
  return { x: left - 8, y: top - 8, width: (r - x) * scale + 16, height: (b - y) * scale + 16 };
}"""
SEEN = """() => ({
  nodes: window.app?.graph?.nodes.map(({ id, type }) => `${id} ${type}`),
  events: window.i2v?.events.map(({ kind }) => kind),
  dialogs: [...document.querySelectorAll('[role=dialog], [data-testid=error-overlay], .i2v-live')].map((element) =>
    element.textContent.trim().slice(0, 300)),
})"""


class PageError(HostError):
    """The page did not show what was expected."""


@contextmanager
def browser() -> Iterator[playwright.Browser]:
    """Start a headless Chromium: Playwright's own if it is installed, else the system's.

    Raises:
        PageError: no Chromium is installed.
    """
    with playwright.sync_playwright() as tool:
        own = Path(tool.chromium.executable_path)
        found = str(own) if own.exists() else next(filter(None, map(shutil.which, BROWSERS)), None)
        if found is None:
            raise PageError("This needs Chromium. Install it, or run: python -m playwright install chromium")
        running = tool.chromium.launch(executable_path=found, args=FLAGS)
        try:
            yield running
        finally:
            running.close()


class Page:
    """A page of a running host. Nodes are identified by their type, or by their id if there are several of a type."""

    def __init__(self, raw: playwright.Page, url: str, settings: Mapping[str, Any]) -> None:
        """Prepare the page without loading it. The host stores `settings` for all of its pages."""
        self.raw = raw
        self.url = url
        self._added = 0
        self._settings = {**SETTINGS, **settings}
        raw.set_default_timeout(PATIENCE_MS)
        raw.add_init_script(HELPERS)

    def open(self, **settings: Any) -> None:
        """Load the page with an empty workflow, after stopping whatever the host runs.

        `settings` hold until the page is opened again, and are named as in `opened`.
        """
        body = json.dumps({**self._settings, **_named(settings)}).encode()
        urllib.request.urlopen(urllib.request.Request(f"{self.url}/settings", body, method="POST")).close()
        self.raw.goto(self.url)
        self.wait("the page to be ready", READY)
        self.raw.evaluate(LISTEN)
        self.raw.evaluate(IDLE)
        self.command("Comfy.NewBlankWorkflow")
        self.wait("an empty graph", "app.graph.nodes.length === 0")

    def wait(self, what: str, condition: str, argument: Any = None, *, patience_ms: float = PATIENCE_MS) -> Any:
        """Wait until the JavaScript `condition`, an expression or a function of `argument`, holds; return its value.

        Raises:
            PageError: it does not within `patience_ms`; the message says what was expected and what the page showed.
        """
        try:
            return self.raw.wait_for_function(condition, arg=argument, timeout=patience_ms).json_value()
        except playwright.TimeoutError:
            raise self._unseen(what) from None

    def see(self, what: str, selector: str) -> playwright.Locator:
        """Wait until an element that `selector` names is visible.

        Raises:
            PageError: as in `wait`.
        """
        element = self.raw.locator(selector).first
        try:
            element.wait_for()
        except playwright.TimeoutError:
            raise self._unseen(what) from None
        return element

    def _unseen(self, what: str) -> PageError:
        return PageError(f"Expected {what}, but the page shows {json.dumps(self.raw.evaluate(SEEN), indent=1)}")

    def command(self, name: str) -> None:
        """Run one of the page's own commands, like its menus and keys do."""
        self.raw.evaluate("name => app.extensionManager.command.execute(name)", name)

    def drop(self, file: Path) -> None:
        """Drop a workflow file onto the canvas, and wait for its nodes."""
        text = file.read_text("utf-8")
        self.raw.evaluate(DROP, [file.name, text])
        types = sorted(node["type"] for node in json.loads(text)["nodes"])
        self.wait(
            f"the nodes of {file.name}",
            "types => JSON.stringify(app.graph.nodes.map((node) => node.type).sort()) === JSON.stringify(types)",
            types,
        )

    def add_by_search(self, name: str) -> None:
        """Double-click the empty canvas, type a node's name, and place the first match."""
        before = self.raw.evaluate("app.graph.nodes.length")
        size = self.raw.viewport_size
        assert size is not None
        # Not where the last node was placed: three clicks in a row do not count as a double click.
        self._added += 1
        x, y = size["width"] * (0.4 + 0.2 * (self._added % 2)), size["height"] * 0.6
        box = self.raw.locator("[role=dialog] input:focus")
        for _ in range(DOUBLE_CLICKS):
            self.raw.mouse.dblclick(x, y)
            with suppress(playwright.TimeoutError):
                box.wait_for(timeout=DOUBLE_CLICK_MS)
                break
        else:
            raise self._unseen("the search box")
        self.raw.keyboard.type(name)
        self.see(f"{name} to be found", f'[data-testid=result-item]:has-text("{name}")')
        self.raw.keyboard.press("Enter")
        self.wait(f"{name} on the canvas", "before => app.graph.nodes.length > before", before)
        self.raw.mouse.click(x, y)  # the node sticks to the mouse until then

    def set(self, node: str | int, values: Mapping[str, Any]) -> None:
        """Set widgets by name."""
        self.raw.evaluate(SET, [node, dict(values)])

    def value(self, node: str | int, name: str) -> Any:
        """Return the value of a widget."""
        return self.raw.evaluate("([node, name]) => i2v.widget(node, name).value", [node, name])

    def run(self) -> None:
        """Press Run, and wait until the host has started."""
        self.raw.evaluate("i2v.events.length = 0")
        self.raw.click("[data-testid=queue-button]")
        self.wait("the run to start", "i2v.events.length > 0")

    def end(self, *, patience_ms: float = 3 * PATIENCE_MS) -> str:
        """Wait for the end of the run; return `execution_success`, `execution_error` or `execution_interrupted`."""
        condition = "i2v.events.find(({ kind }) => i2v.ends.includes(kind))?.kind"
        return self.wait("the run to end", condition, patience_ms=patience_ms)

    def select(self, node: str | int) -> None:
        """Bring a node into view and select it."""
        self.raw.evaluate("key => { app.canvas.selectNode(i2v.node(key)); }", node)
        self.fit(node, top=200)

    def fit(self, *nodes: str | int, left: int = 80, top: int = 100) -> playwright.FloatRect:
        """Bring nodes, or all of them, into view beside the page's menus; return their rectangle."""
        return self.raw.evaluate(FIT, [list(nodes), left, top])

    def templates(self, folder: str) -> playwright.Locator:
        """Open the template browser at a pack's folder and return its cards."""
        self.command("Comfy.BrowseTemplates")
        self.see(f"the folder {folder}", f'[role=dialog] >> text="{folder}"').click()
        return self.raw.locator("[data-testid^=template-workflow-]")

    def picture(self, file: Path, clip: playwright.FloatRect | None = None) -> None:
        """Take a screenshot of the page, or a part of it."""
        file.parent.mkdir(parents=True, exist_ok=True)
        self.raw.screenshot(path=file, clip=clip)


def _named(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {name.replace("_", "."): value for name, value in settings.items()}


@contextmanager
def opened(
    browser: playwright.Browser,
    url: str,
    *,
    nodes_2: bool,
    width_pixels: int = 1400,
    height_pixels: int = 900,
    scale: float = 1.0,
    **settings: Any,
) -> Iterator[Page]:
    """Open an empty page of the host at `url`, on the classic canvas or in Nodes 2.0.

    `scale` is the number of screenshot pixels per page pixel; `settings` are the page's own, with `_` for `.`.
    """
    size: playwright.ViewportSize = {"width": width_pixels, "height": height_pixels}
    raw = browser.new_page(viewport=size, device_scale_factor=scale)
    try:
        page = Page(raw, url, {"Comfy.VueNodes.Enabled": nodes_2, **_named(settings)})
        page.open()
        yield page
    finally:
        raw.close()
