"""Makes the images of the docs and the workflow thumbnails, and the bundled latent.

Frames come from the bundled model, everything else from the real page in a browser. Run it in the environment that
test.py creates: `.venv/bin/python scripts/make_pictures.py`; names such as `graph live_budget` select images.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import imageio.v3 as iio
import torch
from comfy_host import setup
from comfy_host.client import Client
from comfy_host.page import Page, browser, opened
from comfy_host.server import PACK_FOLDER, Server
from comfy_host.workflow import to_prompt
from graphs.flat import NOTES
from matplotlib import get_data_path
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

PACK = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PACK))

from model_stubs import write_configs, write_header, write_named_files  # noqa: E402
from native_card import native_card  # noqa: E402

from i2v_core import stages  # noqa: E402
from i2v_core.families import (  # noqa: E402
    I2VModel,
    Prompt,
    VideoSize,
    load_model,
)
from i2v_core.families.pictures import to_tensor  # noqa: E402
from i2v_core.latent_file import load_latent, save_latent  # noqa: E402
from i2v_core.memory.device import device_facts  # noqa: E402
from i2v_core.planning.plan import Plan  # noqa: E402
from i2v_core.planning.planner import make_plan  # noqa: E402
from i2v_core.planning.request import Budget, Request  # noqa: E402
from i2v_core.units import GIB  # noqa: E402

PROMPTS = ("a red circle moves right and a blue square stays", "a red circle moves up and a blue square stays")
LATENT = PACK / "assets" / "demo_latent.latent"
PICTURE = PACK / "assets" / "demo_input.png"
WORKFLOWS = PACK / "workflows"
IMAGES = PACK / "docs" / "images"
FONT = Path(get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")
BUDGET = "I2VVRAMBudget"
FOLDERS = {"wan2.1-i2v-14b": "wan2.1-i2v-14b-480p"}
"""Model folders in the workflows that differ from the architecture's name."""
FILES = {"wan2.1-i2v-14b": "wan2.1-i2v-14b-480p-Q4_K_M.gguf"}
"""Weight files of the transformer that the workflows use."""
NATIVE = {
    "i2v_native_wan22_14b": "Wan 2.2 A14B",
    "i2v_native_ltx2": "LTX-2",
    "i2v_native_minimax_h3": "MiniMax H3",
    "i2v_native_hunyuan15": "HunyuanVideo 1.5",
}
"""Workflows for core's own loaders, and their models."""
CPU = torch.device("cpu")
RUNTIME = stages.Runtime(device=CPU)
SIDE_PIXELS, GAP_PIXELS, TEXT_PIXELS = 160, 6, 22
CARD_PIXELS = 640
"""Side of a workflow's thumbnail: the template browser's cards are square."""
SHOWN_FRAMES = 4


def plan_for(model: I2VModel, frames: int) -> Plan:
    size = VideoSize(width_pixels=96, height_pixels=96, frames=frames)
    return make_plan(Request(architecture=model.architecture, size=size), Budget(free_bytes=GIB), device_facts(CPU))


def make_latent(model: I2VModel, plan: Plan, picture: Image.Image, text: str) -> Tensor:
    prompt = Prompt(image_FHWC=to_tensor(picture).permute(0, 2, 3, 1), text=text, negative_text="", fps=8)
    conditioning, _ = stages.encode(model, plan, prompt, RUNTIME)
    settings = stages.SamplerSettings(steps=20, cfg=1.25, seed=1)
    samples, _ = stages.sample(model, plan, conditioning, settings, RUNTIME)
    return samples


def shown_frames(model: I2VModel, plan: Plan, samples: Tensor) -> list[Image.Image]:
    """Decode a few frames, evenly spaced from the first to the last."""
    frames_FHWC, _ = stages.decode(model, plan, samples, RUNTIME)
    shown = torch.linspace(0, len(frames_FHWC) - 1, SHOWN_FRAMES).long()
    return [Image.fromarray(pixels) for pixels in (frames_FHWC[shown] * 255).round().byte().numpy()]


def sheet(rows: list[tuple[str, list[Image.Image]]]) -> Image.Image:
    """Lay out rows of images, each with a line of text above it."""
    step, row_pixels = SIDE_PIXELS + GAP_PIXELS, SIDE_PIXELS + GAP_PIXELS + TEXT_PIXELS
    columns = max(len(pictures) for _, pictures in rows)
    canvas = Image.new("RGB", (columns * step + GAP_PIXELS, len(rows) * row_pixels + GAP_PIXELS), "white")
    draw = ImageDraw.Draw(canvas)
    for row, (text, pictures) in enumerate(rows):
        draw.text((GAP_PIXELS, row * row_pixels + 3), text, fill="black")
        for column, picture in enumerate(pictures):
            enlarged = picture.resize((SIDE_PIXELS, SIDE_PIXELS), Image.Resampling.LANCZOS)
            canvas.paste(enlarged, (GAP_PIXELS + column * step, row * row_pixels + TEXT_PIXELS))
    return canvas


def card(title: str, rows: list[list[Image.Image]]) -> Image.Image:
    """Make a square thumbnail for the template browser: rows of images as large as fits, and a title.

    The title is at the bottom, since the page shows a badge in the upper left corner.
    """
    canvas = Image.new("RGB", (CARD_PIXELS, CARD_PIXELS), "white")
    title_pixels = 44
    ImageDraw.Draw(canvas).text(
        (12, CARD_PIXELS - title_pixels + 6), title, fill="black", font=ImageFont.truetype(FONT, 24)
    )
    columns = max(len(row) for row in rows)
    aspect = rows[0][0].height / rows[0][0].width
    width = min(CARD_PIXELS / columns, (CARD_PIXELS - title_pixels) / len(rows) / aspect) - GAP_PIXELS
    size = (int(width), int(width * aspect))
    left = (CARD_PIXELS - columns * (size[0] + GAP_PIXELS)) // 2
    for row, pictures in enumerate(rows):
        for column, picture in enumerate(pictures):
            place = (left + column * (size[0] + GAP_PIXELS), GAP_PIXELS + row * (size[1] + GAP_PIXELS))
            canvas.paste(picture.resize(size, Image.Resampling.LANCZOS), place)
    return canvas


def make_frames() -> None:
    """Run the bundled model for the README's frames, thumbnails of the demo workflows, and the bundled latent."""
    torch.set_num_threads(1)  # more threads slow small layers down
    model = load_model(PACK / "assets" / "demo_model")
    picture = Image.open(PICTURE).convert("RGB")
    plan, long_plan = plan_for(model, 16), plan_for(model, 48)
    latents = [make_latent(model, plan, picture, text) for text in PROMPTS]
    save_latent(LATENT, latents[0], plan)
    frames = [shown_frames(model, plan, samples) for samples in latents]
    rows = [
        (f"input picture, then frames for: {text}", [picture, *shown])
        for text, shown in zip(PROMPTS, frames, strict=True)
    ]
    sheet(rows).save(IMAGES / "demo.png")
    long_frames = shown_frames(model, long_plan, make_latent(model, long_plan, picture, PROMPTS[0]))
    kept_frames = shown_frames(model, plan, load_latent(LATENT)[0])
    save_card("i2v_demo", card("picture + prompt → video", [frames[0][:2], frames[0][2:]]))
    save_card("i2v_batch", card("one video after another", [[shown[0], shown[-1]] for shown in frames]))
    save_card("i2v_long_clip", card("48 frames, saved as decoded", [long_frames[:2], long_frames[2:]]))
    save_card("i2v_decode_latent", card("a saved latent, decoded again", [kept_frames[:2], kept_frames[2:]]))


def save_card(name: str, picture: Image.Image) -> None:
    picture.save(WORKFLOWS / f"{name}.jpg", quality=88)


def graph(page: Page, _: Server) -> None:
    """Take a picture of the demo graph after its run, and save the plot of its memory report."""
    page.drop(WORKFLOWS / "i2v_demo.json")
    page.set(BUDGET, {"budget": "80MiB"})
    run(page)
    page.fit()
    page.wait("the video", "[...document.querySelectorAll('video')].some((it) => it.readyState >= 2)")
    page.wait("messages to go", "!document.querySelector('[data-testid=queue-notification-banner], .p-toast-message')")
    page.picture(IMAGES / "graph.png", page.fit())
    source = page.wait("the memory report", "i2v.node('I2VMemoryReport').imgs?.[0]?.src")
    (IMAGES / "memory_report.png").write_bytes(page.raw.request.get(source).body())


def live_budget(page: Page, _: Server) -> None:
    """Take a picture of VRAM Budget with a video that does not fit, and its suggestions."""
    page.drop(WORKFLOWS / "i2v_demo.json")
    page.set(BUDGET, {"width": 1280, "height": 704, "budget": "64MiB"})
    page.see("suggestions", ".i2v-live.refused button")
    page.picture(IMAGES / "live_budget.png", plan_in_view(page))


def plan_in_view(page: Page) -> Any:
    """Return the rectangle of VRAM Budget on the page, from its widgets to the end of the live plan."""
    page.fit(BUDGET)
    node, plan = page.raw.locator("[data-node-id='3']"), page.raw.locator(".i2v-live .content")
    page.wait(
        "the node in its place",
        "Math.abs(document.querySelector('[data-node-id=\"3\"]').getBoundingClientRect().x - 80) < 9",
    )
    around, inner = node.bounding_box(), plan.bounding_box()
    widgets = page.raw.locator("[data-node-id='3'] >> text=width").first.bounding_box()
    assert around
    assert inner
    assert widgets
    top = widgets["y"] - 7
    return {"x": around["x"], "y": top, "width": around["width"], "height": inner["y"] + inner["height"] - top}


def templates(page: Page, _: Server) -> None:
    """Take a picture of the pack's workflows in the template browser."""
    page.templates(PACK_FOLDER)
    count = len(list(WORKFLOWS.glob("*.json")))
    loaded = "[...document.querySelectorAll('[data-testid^=template-workflow-] img')].filter((it) => it.naturalWidth)"
    page.wait("their pictures", f"count => {loaded}.length >= Math.min(count, 6)", count)
    page.raw.locator("[role=dialog]").first.screenshot(path=IMAGES / "templates.png")


def compare(page: Page, server: Server) -> None:
    """Make the thumbnail of the comparison: frames of both videos and their difference."""
    page.drop(WORKFLOWS / "i2v_compare.json")
    run(page)
    (file,) = (server.output_folder / "video").glob("i2v_compare*.mp4")
    frames = [Image.fromarray(frame) for frame in iio.imread(file, plugin="pyav")]
    shown = [frames[index] for index in (0, len(frames) // 2, len(frames) - 1)]
    save_card("i2v_compare", card("large budget, small budget, difference", [[frame] for frame in shown]))


def cards(page: Page, server: Server) -> None:
    """Make the thumbnails of the workflows for a given card: their live plans, which need only the models' configs."""
    for model, name, files in (
        ("i2vgen-xl", "I2VGen-XL", {f"i2vgen_xl_{size}gb": size for size in (6, 12, 24)}),
        ("svd", "SVD", {"i2v_svd": 6}),
        ("wan2.1-i2v-14b", "Wan 2.1 I2V 14B, Q4_K", {"i2v_wan_14b": 8}),
        ("wan2.2-ti2v-5b", "Wan 2.2 TI2V-5B", {"i2v_wan_5b": 6}),
    ):
        folder = server.models_folder / "diffusers" / FOLDERS.get(model, model)
        write_configs(model, folder)
        if model in FILES:
            write_header(model, server.models_folder / "diffusion_models" / FILES[model])
        for file, gigabytes in files.items():
            page.open()
            page.drop(WORKFLOWS / f"{file}.json")
            page.set(BUDGET, {"plan_for": f"{gigabytes} GB"})
            page.see("a plan that fits", ".i2v-live.fits")
            clip = plan_in_view(page)
            with Image.open(BytesIO(page.raw.screenshot(clip=clip))) as shown:
                width, height, frames = (page.value(BUDGET, it) for it in ("width", "height", "frames"))
                title = f"{name} {width}×{height}×{frames} on {gigabytes} GB"
                save_card(file, card(title, [[shown.convert("RGB")]]))
        shutil.rmtree(folder)


def native(page: Page, server: Server) -> None:
    """Make the thumbnails of the workflows for core's own loaders: the graph, and what VRAM Fit plans for it."""
    object_info = Client(server.url).object_info()
    for stem, name in NATIVE.items():
        file = WORKFLOWS / f"{stem}.json"
        workflow = json.loads(file.read_text("utf-8"))
        write_named_files(workflow, server.models_folder)
        page.open()
        page.drop(file)
        page.wait("the picture", "document.querySelector('[data-node-id] img')?.naturalWidth")
        nodes = [str(node["id"]) for node in workflow["nodes"] if node["type"] not in NOTES]
        with Image.open(BytesIO(page.raw.screenshot(clip=page.fit(*nodes)))) as shown:
            save_card(stem, native_card(name, shown.convert("RGB"), to_prompt(workflow, object_info)))


def run(page: Page) -> None:
    page.run()
    assert page.end(patience_ms=600_000) == "execution_success"


PAGES: dict[str, tuple[bool, Callable[[Page, Server], None]]] = {
    "graph": (False, graph),
    "live_budget": (True, live_budget),
    "compare": (False, compare),
    "cards": (True, cards),
    "native": (True, native),
    "templates": (False, templates),
}
"""Images of the page by name: whether Nodes 2.0 is used, and the function. The last one shows those before it."""


def main() -> None:
    IMAGES.mkdir(parents=True, exist_ok=True)
    wanted = sys.argv[1:] or ["frames", *PAGES]
    if "frames" in wanted:
        make_frames()
    chosen = [PAGES[name] for name in PAGES if name in wanted]
    if not chosen:
        return
    with Server(setup.find(Path(sys.executable))) as server, browser() as chromium:
        shutil.copy(PICTURE, server.input_folder)
        for nodes_2, make in chosen:
            with opened(chromium, server.url, nodes_2=nodes_2, width_pixels=1800, height_pixels=1000) as page:
                make(page, server)


if __name__ == "__main__":
    main()
