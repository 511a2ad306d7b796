"""The thumbnail of a workflow for core's own loaders: its graph, and how VRAM Fit divides a small card for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib import get_data_path
from PIL import Image, ImageDraw, ImageFont

from benchmarks.corpus.clips import sampled
from benchmarks.corpus.models import KnownModel, known_model
from benchmarks.corpus.plans import NotFittedError, Planned, Planner
from i2v_core.planning.cards import CARDS

FONT = Path(get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")
SIDE_PIXELS, MARGIN_PIXELS = 640, 12
TITLE_PIXELS, BAR_PIXELS, TEXT_PIXELS = 44, 58, 22
BARS_PIXELS = 2 * (BAR_PIXELS + TEXT_PIXELS + 16)
CARD = "8 GB"
STEP_COLOUR, WEIGHTS_COLOUR, TEXT_COLOUR = "#d9a441", "#4a8fe0", "black"
"""Those of activations and weights in the live plan of VRAM Budget."""
GIB = 1 << 30


def native_card(name: str, graph: Image.Image, prompt: dict[str, Any]) -> Image.Image:
    """Make the thumbnail.

    Args:
        name: of the model, for people.
        graph: a picture of the workflow's graph.
        prompt: the workflow in the API's format, by which its run is planned. Where the model has no configuration in
            `benchmarks/native_models`, the graph is all that is shown.
    """
    canvas = Image.new("RGB", (SIDE_PIXELS, SIDE_PIXELS), "white")
    draw = ImageDraw.Draw(canvas)
    (first, *_) = sampled(prompt)
    assert first.clip is not None
    largest = max((it.clip for it in sampled(prompt) if it.clip is not None), key=lambda clip: clip.pixels)
    title = f"{name} {largest} with VRAM Fit"
    draw.text((MARGIN_PIXELS, SIDE_PIXELS - TITLE_PIXELS + 6), title, fill=TEXT_COLOUR, font=_font(24))
    model = known_model(first.file)
    plan = None if model is None else _plan(model, largest)
    below = TITLE_PIXELS if plan is None else TITLE_PIXELS + BARS_PIXELS
    shown = _fitted(graph, SIDE_PIXELS - 2 * MARGIN_PIXELS, SIDE_PIXELS - below - 2 * MARGIN_PIXELS)
    space = SIDE_PIXELS - below - shown.height
    canvas.paste(shown, ((SIDE_PIXELS - shown.width) // 2, space // 2))
    if plan is not None:
        _draw_bars(draw, plan, SIDE_PIXELS - below)
    return canvas


def _plan(model: KnownModel, clip: Any) -> Planned | None:
    try:
        planner = Planner(model.at(clip), one_byte=model.stored != "16 bits")
    except NotFittedError:
        return None
    plan = planner.within(CARDS[CARD].free_bytes)
    return None if plan.needed_bytes is None else plan


def _draw_bars(draw: ImageDraw.ImageDraw, plan: Planned, top: float) -> None:
    """Draw two bars as long as the card's memory: the part that a step takes, and what is left for weights."""
    assert plan.needed_bytes is not None
    width = SIDE_PIXELS - 2 * MARGIN_PIXELS
    for who, step_bytes in (("ComfyUI alone", plan.stock_bytes), ("VRAM Fit", plan.needed_bytes)):
        weights_bytes = max(0, min(plan.weights_bytes, plan.usable_bytes - step_bytes))
        head = f"{who} on {CARD}, predicted"
        draw.text((MARGIN_PIXELS, top), head, fill=TEXT_COLOUR, font=_font(TEXT_PIXELS - 3))
        bar_top = top + TEXT_PIXELS + 2
        step_end = MARGIN_PIXELS + width * min(1.0, step_bytes / plan.usable_bytes)
        weights_end = step_end + width * weights_bytes / plan.usable_bytes
        step, weights = f"{step_bytes / GIB:.1f}", f"{weights_bytes / GIB:.1f} of {plan.weights_bytes / GIB:.0f}"
        parts = (
            (MARGIN_PIXELS, step_end, STEP_COLOUR, (f"step {step}", step)),
            (step_end, weights_end, WEIGHTS_COLOUR, (f"weights {weights} GiB", f"{weights} GiB", weights)),
        )
        for left, right, colour, texts in parts:
            draw.rectangle((left, bar_top, right - 1, bar_top + BAR_PIXELS), fill=colour)
            room = right - left - 6
            text = next((it for it in texts if draw.textlength(it, font=_font(TEXT_PIXELS)) <= room), "")
            text_top = bar_top + (BAR_PIXELS - TEXT_PIXELS) / 2 - 3
            draw.text((left + 5, text_top), text, fill=TEXT_COLOUR, font=_font(TEXT_PIXELS))
        top = bar_top + BAR_PIXELS + 14


def _fitted(picture: Image.Image, width: int, height: int) -> Image.Image:
    scale = min(width / picture.width, height / picture.height)
    return picture.resize((int(picture.width * scale), int(picture.height * scale)), Image.Resampling.LANCZOS)


def _font(pixels: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(FONT, pixels)
