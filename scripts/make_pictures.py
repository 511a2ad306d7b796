"""Makes the pictures of the README and beside the demo workflow, from the bundled model and its input picture.

Run it in the environment that demo.py makes: `.venv/bin/python scripts/make_pictures.py`.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from PIL import Image, ImageDraw

PACK = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PACK))

from i2v_core import stages  # noqa: E402
from i2v_core.families import I2VModel, Prompt, VideoSize, load_model  # noqa: E402
from i2v_core.families.pictures import to_tensor  # noqa: E402
from i2v_core.memory.device import device_facts  # noqa: E402
from i2v_core.planning.planner import make_plan  # noqa: E402
from i2v_core.planning.request import Budget, Request  # noqa: E402
from i2v_core.units import GIB  # noqa: E402

PROMPTS = ("a red circle moves right and a blue square stays", "a red circle moves up and a blue square stays")
SHOWN_FRAMES = (0, 5, 10, 15)
CPU = torch.device("cpu")
SIDE_PIXELS, GAP_PIXELS, TEXT_PIXELS = 160, 6, 18


def make_frames(model: I2VModel, picture: Image.Image, text: str) -> list[Image.Image]:
    size = VideoSize(width_pixels=96, height_pixels=96, frames=16)
    plan = make_plan(Request(architecture=model.architecture, size=size), Budget(free_bytes=GIB), device_facts(CPU))
    prompt = Prompt(image_FHWC=to_tensor(picture).permute(0, 2, 3, 1), text=text, negative_text="", fps=8)
    runtime = stages.Runtime(device=CPU)
    conditioning, _ = stages.encode(model, plan, prompt, runtime)
    settings = stages.SamplerSettings(steps=20, cfg=2.0, seed=1)
    samples, _ = stages.sample(model, plan, conditioning, settings, runtime)
    frames_FHWC, _ = stages.decode(model, plan, samples, runtime)
    return [Image.fromarray((frames_FHWC[index] * 255).round().byte().numpy()) for index in SHOWN_FRAMES]


def sheet(rows: list[tuple[str, list[Image.Image]]]) -> Image.Image:
    """Rows of pictures, each row with a line of text above it."""
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


def main() -> None:
    model = load_model(PACK / "assets" / "demo_model")
    picture = Image.open(PACK / "assets" / "demo_input.png").convert("RGB")
    rows = [
        (f"input picture, then frames for: {text}", [picture, *make_frames(model, picture, text)]) for text in PROMPTS
    ]
    (PACK / "docs" / "images").mkdir(parents=True, exist_ok=True)
    sheet(rows).save(PACK / "docs" / "images" / "demo.png")
    sheet(rows[:1]).save(PACK / "workflows" / "i2v_demo.jpg", quality=90)


if __name__ == "__main__":
    main()
