"""Core's Wan in chunks: core's own result, in less memory, with whatever other nodes do to the model."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch

from .conftest import CASE, TOLERANCE, Core, by_place, called_twice, off_by

pytestmark = [pytest.mark.host, pytest.mark.usefixtures("one_thread")]


def test_a_time_step_for_each_frame(
    core: Core, make_patcher: Callable[..., Any], sample: Callable[..., torch.Tensor]
) -> None:
    """TI2V gives known frames the time step 0: the modulation has a row for each latent frame."""
    patcher = make_patcher("wan-ti2v")
    steps = torch.tensor([[0.0, 700.0, 700.0]])
    patcher.add_object_patch("process_timestep", lambda timestep, **_: steps.expand(len(timestep), -1))
    expected = sample(patcher)
    assert off_by(sample(core.chunked(patcher, 1)), expected) <= TOLERANCE


@pytest.mark.parametrize("name", ["attn1_patch", "attn2_patch", "double_block"])
def test_patches_of_other_nodes_act_as_in_core(
    core: Core, make_patcher: Callable[..., Any], sample: Callable[..., torch.Tensor], name: str
) -> None:
    seen: list[torch.Size] = []

    def patch(given: dict[str, Any]) -> Any:
        hidden = given["img"] if name == "double_block" else given["x"]
        seen.append(hidden.shape)
        changed = hidden * 1.01
        return {"img": changed} if name == "double_block" else changed

    patcher = make_patcher("wan-t2v")
    patcher.set_model_patch(patch, name)
    expected, calls = sample(patcher), len(seen)
    if not calls:
        pytest.skip(f"this ComfyUI calls no {name}")
    assert off_by(sample(core.chunked(patcher, 1)), expected) <= TOLERANCE
    assert seen[:calls] == seen[calls:], "the patch has seen other shapes, or was called another number of times"


def test_a_block_that_is_called_twice_by_another_node(
    core: Core, make_patcher: Callable[..., Any], sample: Callable[..., torch.Tensor]
) -> None:
    """A wrapper around a block may hold its input, so that is not overwritten."""

    patcher = make_patcher("wan-t2v")
    patcher.set_model_patch_replace(called_twice, "dit", "double_block", 1)
    expected = sample(patcher)
    assert off_by(sample(core.chunked(patcher, 1)), expected) <= TOLERANCE


def test_attention_that_another_node_has_replaced(
    core: Core, make_patcher: Callable[..., Any], sample: Callable[..., torch.Tensor]
) -> None:
    patcher = make_patcher("wan-t2v")
    for index, block in enumerate(patcher.model.diffusion_model.blocks):
        patcher.add_object_patch(f"diffusion_model.blocks.{index}.cross_attn.forward", by_place(block.cross_attn))
    expected = sample(patcher)
    assert off_by(sample(core.chunked(patcher, 1)), expected) <= TOLERANCE


def test_a_clone_that_moves_to_another_model_gets_its_own_patches(
    core: Core, make_patcher: Callable[..., Any], sample: Callable[..., torch.Tensor]
) -> None:
    first, second = make_patcher("wan-t2v"), make_patcher("wan-t2v")
    with torch.no_grad():
        for parameter in second.model.parameters():
            parameter.mul_(1.1)
    expected = sample(second)
    moved = core.chunked(first, 1).clone(model_override=second.get_clone_model_override())
    assert off_by(sample(moved), expected) <= TOLERANCE


def test_two_fits_in_a_row_are_one(
    core: Core, make_patcher: Callable[..., Any], sample: Callable[..., torch.Tensor]
) -> None:
    fit = core.native("fit")
    patcher = make_patcher("wan-i2v")
    expected = sample(patcher)
    once = core.chunked(patcher, 1)
    sample(once)  # its patches are in the model still
    twice = core.chunked(once, 1)
    assert twice.get_attachment(fit.KEY).left_out == []
    assert len(twice.get_wrappers("outer_sample", fit.KEY)) == 1
    assert off_by(sample(twice), expected) <= TOLERANCE


@pytest.mark.parametrize(
    ("name", "stored"),
    [
        ("t2v", torch.float8_e4m3fn),
        *((it, torch.float16) for it in ("i2v", "camera", "vace", "s2v", "humo", "animate")),
    ],
)
def test_weights_are_cast_as_often_as_in_core(
    core: Core,
    make_patcher: Callable[..., Any],
    sample: Callable[..., torch.Tensor],
    casts_of: Callable[[torch.dtype], list[str]],
    name: str,
    stored: torch.dtype,
) -> None:
    """However many chunks a layer runs in."""
    patcher = make_patcher(f"wan-{name}", dtype=stored, compute_dtype=torch.float32)
    casts = casts_of(stored)
    expected, of_core = sample(patcher, cfg=1.0), len(casts)
    result = sample(core.chunked(patcher, 1), cfg=1.0)
    assert off_by(result, expected) <= TOLERANCE
    assert len(casts) - of_core == of_core
    assert all(it.weight.dtype is stored for it in patcher.model.diffusion_model.blocks[0].ffn if hasattr(it, "weight"))


def test_a_lora_is_applied(core: Core, make_patcher: Callable[..., Any], sample: Callable[..., torch.Tensor]) -> None:
    patcher = make_patcher("wan-t2v")
    weight = patcher.model.diffusion_model.blocks[0].ffn[0].weight
    patched = patcher.clone()
    patched.add_patches({"diffusion_model.blocks.0.ffn.0.weight": (torch.full_like(weight, 0.5),)}, 1.0)
    expected = sample(patched)
    assert off_by(expected, sample(patcher)) > 1e-3
    assert off_by(sample(core.chunked(patched, 1)), expected) <= TOLERANCE


@contextmanager
def recorded(blocks: Any) -> Iterator[list[tuple[int, int]]]:
    """The storages of the hidden states that blocks get and give."""
    seen: list[tuple[int, int]] = []

    def storage(value: Any) -> int:
        return value.untyped_storage().data_ptr()

    def hook(_block: Any, args: tuple[Any, ...], result: Any) -> None:
        made = result[1] if isinstance(result, tuple) else result  # VACE's give what they add first
        seen.append((storage(args[0]), storage(made)))

    handles = [block.register_forward_hook(hook) for block in blocks]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


IN_PLACE = ["i2v", "bernini", "fun-control-2.2", "camera", "vace", "s2v", "humo", "animate", "scail-2", "dancer"]


@pytest.mark.parametrize("name", IN_PLACE)
def test_the_hidden_state_is_never_copied(
    core: Core, make_patcher: Callable[..., Any], sample: Callable[..., torch.Tensor], name: str
) -> None:
    patcher = make_patcher(f"wan-{name}")
    model = patcher.model.diffusion_model
    blocks = [*model.blocks, *getattr(model, "vace_blocks", ())]
    with recorded(blocks) as storages:
        sample(core.chunked(patcher, 1), cfg=1.0)
    assert storages
    assert all(given == made for given, made in storages)


def test_a_model_of_another_class_is_not_overwritten(
    core: Core, make_patcher: Callable[..., Any], sample: Callable[..., torch.Tensor]
) -> None:
    """It may hold the hidden state; and blocks of another class than core's run as they are."""
    patcher = make_patcher("wan-t2v")
    model = patcher.model.diffusion_model
    model.__class__ = type("OtherModel", (type(model),), {})
    model.blocks[1].__class__ = type("OtherBlock", (type(model.blocks[1]),), {})
    expected = sample(patcher)
    clone = core.chunked(patcher, 1)
    assert "run as they are, since their class is not core's own: 1 of 3 blocks" in str(
        clone.get_attachment(core.native("fit").KEY)
    )
    with recorded(model.blocks) as storages:
        assert off_by(sample(clone), expected) <= TOLERANCE
    assert all(given != made for given, made in storages)


def test_what_another_nodes_block_keeps_is_not_overwritten(
    core: Core, make_patcher: Callable[..., Any], sample: Callable[..., torch.Tensor]
) -> None:
    """A cache of residuals keeps it, in the place of a block's forward."""
    patcher = make_patcher("wan-t2v")
    block = patcher.model.diffusion_model.blocks[0]
    kept: list[tuple[torch.Tensor, torch.Tensor]] = []

    def forward(x: torch.Tensor, **options: Any) -> torch.Tensor:
        result = type(block).forward(block, x, **options)
        kept.append((result, result.clone()))
        return result

    patcher.add_object_patch("diffusion_model.blocks.0.forward", forward)
    expected = sample(patcher)
    kept.clear()
    assert off_by(sample(core.chunked(patcher, 1)), expected) <= TOLERANCE
    assert kept
    assert all(torch.equal(result, then) for result, then in kept)


def test_another_node_that_runs_the_blocks_itself(
    core: Core, make_patcher: Callable[..., Any], sample: Callable[..., torch.Tensor]
) -> None:
    """It may hold what it gives to a block, to see how much that has changed it."""
    patcher = make_patcher("wan-t2v")
    model = patcher.model.diffusion_model

    def forward_orig(x: torch.Tensor, _t: Any, context: torch.Tensor, freqs: torch.Tensor, **_: Any) -> torch.Tensor:
        embedded = model.patch_embedding(x.float()).flatten(2).transpose(1, 2)
        text = model.text_embedding(context)
        changed = model.blocks[0](embedded, e=torch.ones(len(x), 1, 6, model.dim), freqs=freqs, context=text)
        return x * (changed - embedded).square().mean()

    patcher.add_object_patch("diffusion_model.forward_orig", forward_orig)
    expected = sample(patcher)
    assert off_by(sample(core.chunked(patcher, 1)), expected) <= TOLERANCE


def test_what_an_attention_patch_keeps_is_not_overwritten(
    core: Core, make_patcher: Callable[..., Any], sample: Callable[..., torch.Tensor]
) -> None:
    kept: list[tuple[torch.Tensor, torch.Tensor]] = []

    def patch(given: dict[str, Any]) -> torch.Tensor:
        kept.append((given["x"], given["x"].clone()))
        return given["x"]

    patcher = make_patcher("wan-t2v")
    patcher.set_model_patch(patch, "attn2_patch")
    expected = sample(patcher)
    kept.clear()
    assert off_by(sample(core.chunked(patcher, 1)), expected) <= TOLERANCE
    assert kept
    assert all(torch.equal(given, then) for given, then in kept)


@pytest.mark.parametrize("part", ["patch_embedding", "vace_patch_embedding", "vace_blocks.0", "blocks.0"])
def test_vace_with_a_part_of_another_node(
    core: Core, make_patcher: Callable[..., Any], sample: Callable[..., torch.Tensor], part: str
) -> None:
    """Both lines' first hidden states are summed before the first block only where all of it is this pack's."""
    patcher = make_patcher("wan-vace")
    module = patcher.model.diffusion_model.get_submodule(part)
    patcher.add_object_patch(
        f"diffusion_model.{part}.forward", lambda *args, **options: type(module).forward(module, *args, **options)
    )
    expected = sample(patcher)
    assert off_by(sample(core.chunked(patcher, 1)), expected) <= TOLERANCE


def test_vace_with_a_patch_after_its_blocks(
    core: Core, make_patcher: Callable[..., Any], sample: Callable[..., torch.Tensor]
) -> None:
    patcher = make_patcher("wan-vace")
    patcher.set_model_patch(lambda given: given, "double_block")
    patcher.set_model_patch(lambda given: given["x"], "attn2_patch")
    expected = sample(patcher)
    assert off_by(sample(core.chunked(patcher, 1)), expected) <= TOLERANCE


def test_audio_attention_that_another_node_has_replaced(
    core: Core, make_patcher: Callable[..., Any], sample: Callable[..., torch.Tensor]
) -> None:
    parts = {"wan-s2v": "audio_injector.injector.0", "wan-humo": "blocks.0.audio_cross_attn_wrapper.audio_cross_attn"}
    for name, part in parts.items():
        patcher = make_patcher(name)
        own = patcher.model.diffusion_model.get_submodule(part)

        def forward(x: torch.Tensor, context: torch.Tensor, own: Any = own, **options: Any) -> torch.Tensor:
            # Looks at a token's place in the whole.
            place = torch.linspace(0, 1, x.shape[0] * x.shape[1]).view(*x.shape[:2], 1)
            return type(own).forward(own, x, context, **options) * place

        patcher.add_object_patch(f"diffusion_model.{part}.forward", forward)
        expected = sample(patcher)
        assert off_by(sample(core.chunked(patcher, 1)), expected) <= TOLERANCE, name


def test_dancer_at_another_frame_rate(
    core: Core, make_patcher: Callable[..., Any], sample: Callable[..., torch.Tensor]
) -> None:
    """Has layers of its own; some of core's versions hand the rate over as a tensor, whose value the twin must know."""
    patcher = make_patcher("wan-dancer")
    case = patcher.get_attachment(CASE)

    def slower(generator: torch.Generator, shape: tuple[int, ...]) -> list[Any]:
        text, options = case.conditioning(generator, shape)
        return [text, {**options, "fps": 15, "audio_inject_scale": 0.8}]

    usual = sample(patcher, cfg=1.0)
    patcher.set_attachments(CASE, replace(case, conditioning=slower))
    expected = sample(patcher, cfg=1.0)
    assert off_by(expected, usual) > 1e-3
    assert off_by(sample(core.chunked(patcher, 1), cfg=1.0), expected) <= TOLERANCE
    fit = core.native("fit")
    planned, _ = fit.fitted(patcher, fit.Services(usable_bytes=lambda: 2**40, check_cancelled=lambda: None))
    assert torch.equal(sample(planned, cfg=1.0), expected)


def test_the_face_of_animate(core: Core, make_patcher: Callable[..., Any], sample: Callable[..., torch.Tensor]) -> None:
    """With small images of it, for which the encoder has fewer layers."""
    patcher = make_patcher("wan-animate")
    encoder = patcher.model.diffusion_model.motion_encoder.enc.net_app
    encoder.convs = torch.nn.Sequential(*encoder.convs[:5], encoder.convs[-1])
    case = patcher.get_attachment(CASE)

    def with_face(generator: torch.Generator, shape: tuple[int, ...]) -> list[Any]:
        text, options = case.conditioning(generator, shape)
        return [text, {**options, "face_video_pixels": torch.randn(1, 3, 9, 64, 64, generator=generator)}]

    without = sample(patcher)
    patcher.set_attachments(CASE, replace(case, conditioning=with_face))
    expected = sample(patcher)
    assert off_by(expected, without) > 1e-3
    for workspace_bytes in (1, 300_000):
        assert off_by(sample(core.chunked(patcher, workspace_bytes)), expected) <= TOLERANCE
    assert torch.equal(sample(core.chunked(patcher, None)), expected)


class SpeechBlock(torch.nn.Module):
    """A block of InfiniteTalk's model patch, which in core has forty heads."""

    def __init__(self, core: Core) -> None:
        super().__init__()
        multitalk = importlib.import_module("comfy.ldm.wan.model_multitalk")
        operations = core.ops.disable_weight_init
        self.audio_cross_attn = multitalk.SingleStreamMultiAttention(96, 64, 4, qkv_bias=True, operations=operations)
        self.norm_x = operations.LayerNorm(96)
        for parameter in self.parameters():
            torch.nn.init.normal_(parameter, std=0.3)


@pytest.mark.parametrize("others", [False, True])
def test_a_speaker_is_heard_some_frames_at_a_time(
    core: Core, make_patcher: Callable[..., Any], sample: Callable[..., torch.Tensor], *, others: bool
) -> None:
    """In place, unless another node's patch has run before, which may hold the hidden state."""
    patcher = make_patcher("wan-t2v")
    expected_silence = sample(patcher, cfg=1.0)
    speech = torch.nn.Module()
    speech.blocks = torch.nn.ModuleList(SpeechBlock(core) for _ in patcher.model.diffusion_model.blocks)
    cpu = torch.device("cpu")
    model_patch = core.model_patcher.ModelPatcher(speech, load_device=cpu, offload_device=cpu)
    if others:
        patcher.set_model_patch(lambda given: given["x"], "attn2_patch")
    multitalk = importlib.import_module("comfy.ldm.wan.model_multitalk")
    patcher.set_model_patch(multitalk.MultiTalkCrossAttnPatch(model_patch, 0.8), "attn2_patch")
    patcher.model_options["transformer_options"]["audio_embeds"] = torch.randn(1, 3, 5, 64)
    expected = sample(patcher, cfg=1.0)
    assert off_by(expected, expected_silence) > 1e-3
    with recorded(patcher.model.diffusion_model.blocks) as storages:
        assert off_by(sample(core.chunked(patcher, 1), cfg=1.0), expected) <= TOLERANCE
    assert all((given == made) is not others for given, made in storages)


def test_an_autoregressive_model_is_not_known(core: Core) -> None:
    """Its sampler calls it past every wrapper, so a plan would neither hold nor be right."""
    ar_model = pytest.importorskip("comfy.ldm.wan.ar_model")
    model = ar_model.CausalWanModel(num_layers=1, device="meta", operations=core.ops.disable_weight_init)
    assert core.native("model").native_model(model) is None
