"""One real ComfyUI for all tests that need it, and prompts for it."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from comfy_host import frontend, setup
from comfy_host.client import Client
from comfy_host.server import Server
from PIL import Image, ImageDraw

Prompt = dict[str, dict[str, Any]]
MakePrompt = Callable[..., Prompt]

PICTURE = "circle.png"
SCREENSHOTS = setup.PACK / "build" / "screenshots"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker("host")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """A test that fails shows what the host printed."""
    report = yield
    server = getattr(item, "funcargs", {}).get("server")
    if report.failed and isinstance(server, Server):
        report.sections.append(("ComfyUI", server.log_tail()))
    return report


@contextmanager
def small_host(tiny_folder: Path, *arguments: str) -> Iterator[Server]:
    """A host with this pack, a small model named `tiny` and a picture; without a way to fetch anything.

    Further `arguments` are for its `main.py`.
    """
    environment = {
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "MALLOC_MMAP_THRESHOLD_": str(1 << 16),  # glibc gives a freed tensor back at once: its memory use can be read
    }
    with Server(setup.find(Path(sys.executable)), arguments=arguments, environment=environment) as running:
        shutil.copytree(tiny_folder, running.models_folder / "diffusers" / "tiny")
        picture = Image.new("RGB", (96, 64), "navy")
        ImageDraw.Draw(picture).ellipse((10, 10, 50, 50), fill="orange")
        picture.save(running.input_folder / PICTURE)
        shutil.copy(setup.PACK / "assets" / "demo_input.png", running.input_folder)
        yield running


@pytest.fixture(scope="session")
def server(tiny_folder: Path) -> Iterator[Server]:
    """The host that tests share."""
    with small_host(tiny_folder) as running:
        yield running


@pytest.fixture(scope="session")
def newest_page_server(tiny_folder: Path) -> Iterator[Server]:
    """A host with the newest page in place of the one that came with it."""
    folder = frontend.ensure(setup.CACHE, Path(sys.executable))
    with small_host(tiny_folder, "--front-end-root", str(folder)) as running:
        yield running


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    """A headless browser. For a file at a time: while it is there, this thread can run no event loop of its own."""
    pages = pytest.importorskip("comfy_host.page", reason="needs the package playwright")
    with ExitStack() as stack:
        try:
            browser = stack.enter_context(pages.browser())
        except pages.PageError as error:
            pytest.skip(str(error))
        yield browser


@pytest.fixture(
    scope="module",
    params=[("server", False), ("server", True), ("newest_page_server", False), ("newest_page_server", True)],
    ids=["bundled_classic", "bundled_nodes2", "newest_classic", "newest_nodes2"],
)
def loaded_page(request: pytest.FixtureRequest, chromium: Any) -> Iterator[Any]:
    """A page of each kind that a user may have: the host's own or the newest, on the classic canvas or in Nodes 2.0."""
    from comfy_host.page import opened

    host, nodes_2 = request.param
    with opened(chromium, request.getfixturevalue(host).url, nodes_2=nodes_2) as page:
        yield page


@pytest.fixture
def page(loaded_page: Any, request: pytest.FixtureRequest) -> Iterator[Any]:
    """The loaded page with an empty graph; what it shows in the end is kept as a picture."""
    loaded_page.open()
    yield loaded_page
    name = "".join(letter if letter.isalnum() else "_" for letter in request.node.name)
    loaded_page.picture(SCREENSHOTS / f"{name}.png")


@pytest.fixture(scope="module")
def own_server(tiny_folder: Path) -> Iterator[Server]:
    """A host for one file's tests alone."""
    with small_host(tiny_folder) as running:
        yield running


@pytest.fixture(scope="session")
def client(server: Server) -> Client:
    return Client(server.url)


@pytest.fixture(scope="session")
def object_info(client: Client) -> dict[str, Any]:
    return client.object_info()


@pytest.fixture(scope="session")
def make_prompt() -> MakePrompt:
    """Makes a small prompt from picture to frames; arguments `node={input: value}` change it."""

    def make(**changes: dict[str, Any]) -> Prompt:
        nodes: dict[str, tuple[str, dict[str, Any]]] = {
            "picture": ("LoadImage", {"image": PICTURE}),
            "loader": ("I2VLoader", {"model": "tiny"}),
            "budget": (
                "I2VVRAMBudget",
                {
                    "model": ["loader", 0],
                    "width": 64,
                    "height": 64,
                    "frames": 4,
                    "guidance": True,
                    "precision": "fp32",
                    "budget": "auto",
                    "reserve_gib": 0.0,
                },
            ),
            "encode": (
                "I2VEncode",
                {
                    "model": ["loader", 0],
                    "plan": ["budget", 0],
                    "image": ["picture", 0],
                    "prompt": "a circle moves right",
                    "negative_prompt": "",
                    "fps": 8,
                },
            ),
            "sampler": (
                "I2VChunkedSampler",
                {
                    "model": ["loader", 0],
                    "plan": ["budget", 0],
                    "conditioning": ["encode", 0],
                    "steps": 2,
                    "cfg": 2.0,
                    "seed": 1,
                    "scheduler": "ddim",
                },
            ),
            "decode": (
                "I2VVAETiledDecode",
                {
                    "model": ["loader", 0],
                    "plan": ["budget", 0],
                    "latent": ["sampler", 0],
                    "tile_size": 0,
                    "overlap": 0,
                },
            ),
            "save": ("SaveImage", {"images": ["decode", 0], "filename_prefix": "frame"}),
        }
        return {
            name: {"class_type": kind, "inputs": {**inputs, **changes.get(name, {})}}
            for name, (kind, inputs) in nodes.items()
        }

    return make
