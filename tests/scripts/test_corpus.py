"""Sizes of clips are found in a prompt, whatever gives them."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.corpus.arithmetic import value_of
from benchmarks.corpus.clips import Clip, Sampled, sampled
from benchmarks.corpus.figures import Figures, Pictures


@pytest.mark.parametrize(
    ("formula", "value"),
    [
        ("floor (a * b + 1)", 81),
        ("max(16, floor(a / 16) * 16)", 16),
        ("(int(a) // 2) * 2", 4),
        ("a > 4", True),
        ("-a if a < 0 else a % 3", 2),
    ],
)
def test_a_formula_has_its_value(formula: str, value: float) -> None:
    assert value_of(formula, {"a": 5, "b": 16}) == value


@pytest.mark.parametrize("formula", ["c + 1", "a.real", "__import__('os')", "a ** a", "a +", "1 / 0", "[a]"])
def test_what_is_not_known_is_refused(formula: str) -> None:
    with pytest.raises(ValueError, match=r"cannot be worked out|is not known"):
        value_of(formula, {"a": 5})


def node(kind: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": kind, "inputs": inputs}


def test_figures_follow_links() -> None:
    figures = Figures(
        {
            "seconds": node("PrimitiveInt", value=5),
            "frames": node("ComfyMathExpression", expression="a * 24 + 1", **{"values.a": ["seconds", 0]}),
            "switch": node("ComfySwitchNode", switch=True, on_false=3, on_true=["frames", 1]),
            "shape": node("ResolutionSelector", aspect_ratio="16:9 (Widescreen)", megapixels=0.4, multiple=32),
            "picture": node("LoadImage", image="a.png"),
            "resized": node(
                "ResizeImageMaskNode",
                input=["picture", 0],
                **{"resize_type.width": ["shape", 0], "resize_type.height": ["shape", 1]},
            ),
            "half": node("ImageScaleBy", image=["resized", 0], scale_by=0.5),
            "edges": node("Canny", image=["half", 0]),
            "size": node("GetImageSize", image=["edges", 0]),
        }
    )
    assert figures.whole(["switch", 0]) == 121
    assert figures.pictures(["edges", 0]) == Pictures(432, 240)
    assert [figures.whole(["size", it]) for it in range(3)] == [432, 240, 1]
    assert figures.pictures(["picture", 0]).width is None
    assert figures.number("euler") is None


def test_each_sampler_has_its_clip_and_its_model() -> None:
    prompt = {
        "file": node("UNETLoader", unet_name="a.safetensors"),
        "lora": node("LoraLoaderModelOnly", model=["file", 0]),
        "fit": node("I2VVRAMFit", model=["file", 0], model_2=["lora", 0]),
        "empty": node("EmptyLTXVLatentVideo", width=640, height=352, length=["seconds", 0]),
        "seconds": node("PrimitiveInt", value=121),
        "guider": node("CFGGuider", model=["fit", 0]),
        "first": node("SamplerCustomAdvanced", guider=["guider", 0], latent_image=["empty", 0]),
        "larger": node("LTXVLatentUpsampler", samples=["first", 0]),
        "second": node("KSampler", model=["fit", 1], latent_image=["larger", 0]),
    }
    assert list(sampled(prompt)) == [
        Sampled("a.safetensors", Clip(640, 352, 121)),
        Sampled("a.safetensors", Clip(1280, 704, 121)),
    ]
    del prompt["seconds"]["inputs"]["value"]
    assert {it.clip for it in sampled(prompt)} == {None}
