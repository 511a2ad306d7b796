"""Core's Wan models in chunks, equal to core's own forward: one file for each part that they are made of."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from comfy.ldm.wan import model as core
from comfy.ldm.wan import model_animate
from torch import nn

from ..block_input import comes_from_ours
from ..calls import CallState
from ..model import Patch
from .animate import AfterPatchEmbedding, FaceBlock
from .audio import AudioBlock, AudioInjector
from .block import Block
from .embedding import CameraAdapter, PatchEmbedding
from .head import Head
from .vace import ControlEmbedding, FirstEmbedding, FirstSum, VaceBlock

Make = Callable[[Any, CallState], Callable[..., Any]]

_BLOCKS: dict[type[nn.Module], type[Block]] = {
    core.WanAttentionBlock: Block,
    core.WanAttentionBlockAudio: AudioBlock,
}
_PARTS: dict[type[nn.Module], Make] = {
    core.Head: Head,
    core.AudioInjector_WAN: AudioInjector,
    core.WanCamAdapter: CameraAdapter,
    model_animate.FaceBlock: FaceBlock,
}
_EMBEDDINGS: dict[str, Make] = {
    "patch_embedding": partial(PatchEmbedding, in_fp32=True),
    "patch_embedding_global": partial(PatchEmbedding, in_fp32=True),
    "patch_embedding_pose": partial(PatchEmbedding, in_fp32=True),
    "patch_embedding_mask": partial(PatchEmbedding, in_fp32=True),
    "pose_patch_embedding": partial(PatchEmbedding, in_fp32=False),
    "cond_encoder": partial(PatchEmbedding, in_fp32=False),
}


def _classes(module: str, *names: str) -> tuple[type[nn.Module], ...]:
    """Core's model classes of these names; older versions of core lack some."""
    path = f"comfy.ldm.wan.{module}"
    found = import_module(path) if find_spec(path) is not None else None
    return tuple(getattr(found, name) for name in names if hasattr(found, name))


_AUTOREGRESSIVE = _classes("ar_model", "CausalWanModel")
"""Samples some frames at a time, by calls that no wrapper sees; its memory is that of the keys and values it keeps."""
_HELD_BY_NOBODY = (
    *_classes("model", "WanModel", "CameraWanModel", "WanModel_S2V", "HumoWanModel", "SCAILWanModel", "SCAIL2WanModel"),
    *_classes("model_animate", "AnimateWanModel"),
    *_classes("model_wandancer", "WanDancerModel"),
)
"""Models that keep no reference to the hidden state that they hand to a block, so that it may be updated in place."""


class Wan:
    """`model.NativeModel` for every core model whose blocks are `WanAttentionBlock`s."""

    name = "Wan"

    def recognises(self, model: nn.Module) -> bool:
        return isinstance(model, core.WanModel) and not isinstance(model, _AUTOREGRESSIVE)

    def block_lists(self, model: nn.Module) -> tuple[str, ...]:
        return tuple(name for name in ("blocks", "vace_blocks") if hasattr(model, name))

    def patches(self, model: Any, state: CallState) -> Iterator[Patch]:
        """Replacement forwards by their path below the model; parts that are not core's own are left out."""
        is_vace = type(model) is core.VaceWanModel and hasattr(model, "vace_blocks")
        first_sum = FirstSum(model, state) if is_vace else None
        for index, block in enumerate(model.blocks):
            if make := _BLOCKS.get(type(block)):
                may_overwrite = _may_overwrite(model, index, first_sum)
                yield Patch(f"blocks.{index}", block, make(block, state, may_overwrite=may_overwrite))
        for path, module in model.named_modules():
            if make := _PARTS.get(type(module)):
                yield Patch(path, module, make(module, state))
        for name, make in (_EMBEDDINGS if first_sum is None else _vace_embeddings(first_sum)).items():
            if embedding := getattr(model, name, None):
                yield Patch(name, embedding, make(embedding, state))
        if type(model) is model_animate.AnimateWanModel:
            yield Patch("", model, AfterPatchEmbedding(model, state), method="after_patch_embedding")
        if first_sum is not None:
            for index, block in enumerate(model.vace_blocks):
                if type(block) is core.VaceWanAttentionBlock:
                    yield Patch(f"vace_blocks.{index}", block, VaceBlock(block, state, first_sum))


def _may_overwrite(model: nn.Module, index: int, first_sum: FirstSum | None) -> Callable[[], bool]:
    """Whether a block's hidden state is one that nobody else will read."""
    if first_sum is None and type(model) not in _HELD_BY_NOBODY:
        return lambda: False
    before = model.get_submodule(f"blocks.{index - 1}") if index else None

    def may_overwrite() -> bool:
        kept_for_vace = before is None and first_sum is not None and not first_sum.is_taken_early()
        return not kept_for_vace and comes_from_ours(model, "forward_orig", before, Block)

    return may_overwrite


def _vace_embeddings(first_sum: FirstSum) -> dict[str, Make]:
    return {
        "patch_embedding": partial(FirstEmbedding, first_sum=first_sum),
        "vace_patch_embedding": partial(ControlEmbedding, first_sum=first_sum),
    }


MODEL = Wan()
