"""Makes the pictures of the README and beside the workflows, and the bundled latent, from the bundled model.

Run it in the environment that demo.py makes: `.venv/bin/python scripts/make_pictures.py`.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from torch import Tensor

PACK = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PACK))

from i2v_core import stages  # noqa: E402
from i2v_core.families import I2VModel, Prompt, VideoSize, load_model  # noqa: E402
from i2v_core.families.pictures import to_tensor  # noqa: E402
from i2v_core.latent_file import load_latent, save_latent  # noqa: E402
from i2v_core.memory.device import device_facts  # noqa: E402
from i2v_core.planning.plan import Plan  # noqa: E402
from i2v_core.planning.planner import make_plan  # noqa: E402
from i2v_core.planning.request import Budget, Request  # noqa: E402
from i2v_core.units import GIB  # noqa: E402

PROMPTS = ("a red circle moves right and a blue square stays", "a red circle moves up and a blue square stays")
LATENT = PACK / "assets" / "demo_latent.latent"
WORKFLOWS = PACK / "workflows"
CPU = torch.device("cpu")
RUNTIME = stages.Runtime(device=CPU)
SIDE_PIXELS, GAP_PIXELS, TEXT_PIXELS = 160, 6, 18
SHOWN_FRAMES = 4


def plan_for(model: I2VModel, frames: int) -> Plan:
    size = VideoSize(width_pixels=96, height_pixels=96, frames=frames)
    return make_plan(Request(architecture=model.architecture, size=size), Budget(free_bytes=GIB), device_facts(CPU))


def make_latent(model: I2VModel, plan: Plan, picture: Image.Image, text: str) -> Tensor:
    prompt = Prompt(image_FHWC=to_tensor(picture).permute(0, 2, 3, 1), text=text, negative_text="", fps=8)
    conditioning, _ = stages.encode(model, plan, prompt, RUNTIME)
    settings = stages.SamplerSettings(steps=20, cfg=2.0, seed=1)
    samples, _ = stages.sample(model, plan, conditioning, settings, RUNTIME)
    return samples


def shown_frames(model: I2VModel, plan: Plan, samples: Tensor) -> list[Image.Image]:
    """A few frames from the first to the last."""
    frames_FHWC, _ = stages.decode(model, plan, samples, RUNTIME)
    shown = torch.linspace(0, len(frames_FHWC) - 1, SHOWN_FRAMES).long()
    return [Image.fromarray(pixels) for pixels in (frames_FHWC[shown] * 255).round().byte().numpy()]


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
    plan, long_plan = plan_for(model, 16), plan_for(model, 48)
    latents = [make_latent(model, plan, picture, text) for text in PROMPTS]
    save_latent(LATENT, latents[0], plan)
    rows = [
        (f"input picture, then frames for: {text}", [picture, *shown_frames(model, plan, samples)])
        for text, samples in zip(PROMPTS, latents, strict=True)
    ]
    long_frames = shown_frames(model, long_plan, make_latent(model, long_plan, picture, PROMPTS[0]))

    (PACK / "docs" / "images").mkdir(parents=True, exist_ok=True)
    sheet(rows).save(PACK / "docs" / "images" / "demo.png")
    sheet(rows[:1]).save(WORKFLOWS / "i2v_demo.jpg", quality=90)
    sheet([("frames of 48, saved as they are decoded", [picture, *long_frames])]).save(
        WORKFLOWS / "i2v_long_clip.jpg", quality=90
    )
    kept_frames = shown_frames(model, plan, load_latent(LATENT)[0])
    sheet([("a kept latent, decoded again", kept_frames)]).save(WORKFLOWS / "i2v_decode_latent.jpg", quality=90)


if __name__ == "__main__":
    main()
