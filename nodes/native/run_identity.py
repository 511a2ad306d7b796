"""The identity of a run of a sampler, beyond the inputs of its calls: the model's weights and patches, and the prompt.

It is the same in another process, so that a run which was cut short is known when it is queued again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import chain
from typing import Any

from comfy.ldm.modules import attention
from comfy_execution import progress
from comfy_execution.graph_utils import is_link
from comfy_execution.utils import get_executing_context
from comfyui_version import __version__ as host_version
from torch import Tensor, nn

from ...i2v_core.sampling.digest import digest

_SETTINGS_OF_THIS_PACK = {"I2VVRAMFit": ("budget", "checkpoint")}
"""Widgets, by the class of their node, that change no result: after a failure they may be set otherwise."""


def model_identity(patcher: Any, *, object_levels: int) -> str:
    """A hash of a model as it runs: a few values of each weight, patches on them, and what other nodes have set.

    Args:
        object_levels: as in `digest`, for other nodes' patches.
    """
    base = patcher.model
    unpatched: Mapping[str, Any] = patcher.backup
    model = base.diffusion_model
    weights = {
        name: unpatched[key].weight if (key := f"diffusion_model.{name}") in unpatched else weight
        for name, weight in chain(model.named_parameters(), _buffers(model))
    }
    return digest(
        {
            "class": type(model).__qualname__,
            "host": host_version,
            "precision": (base.get_dtype_inference(), base.manual_cast_dtype),
            "attention": attention.optimized_attention,
            "weights": digest(weights, sampled=True),
            "patches": digest(patcher.patches, sampled=True, object_levels=1),
            "others": digest(
                {
                    "objects": {name: it for name, it in patcher.object_patches.items() if not is_ours(it)},
                    "weights": patcher.weight_wrapper_patches,
                    "injections": patcher.injections,
                    "options": patcher.model_options,
                    "wrappers": [_others(it) for it in (patcher.wrappers, patcher.callbacks)],
                },
                sampled=True,
                object_levels=object_levels,
            ),
        }
    )


def prompt_identity() -> str | None:
    """A hash of the node that runs and of all that it is computed from; None outside of a prompt.

    Where the node is not known (it samples in a thread of its own), the whole prompt counts.
    """
    registry, context = progress.global_progress_registry, get_executing_context()
    if registry is None or not registry.prompt_id:  # no prompt has run in this program
        return None
    prompt, known = registry.dynprompt, dict[str, str]()
    if context is not None and context.prompt_id == registry.prompt_id:
        return digest([_node_identity(prompt, context.node_id, known), context.list_index])
    return digest(sorted(_node_identity(prompt, node, known) for node in prompt.all_node_ids()))


def prompt_id() -> str:
    """The host's name of the prompt that runs; empty outside of one."""
    registry = progress.global_progress_registry
    return str(registry.prompt_id) if registry is not None else ""


def _node_identity(prompt: Any, node_id: str, known: dict[str, str]) -> str:
    """A hash of a node's class and inputs; in place of its id, which may differ, it stands for the node in others."""
    if node_id not in known:
        node = prompt.get_node(node_id)
        left_out = _SETTINGS_OF_THIS_PACK.get(node["class_type"], ())
        inputs = {
            name: [_node_identity(prompt, it[0], known), it[1]] if is_link(it) else it
            for name, it in node["inputs"].items()
            if name not in left_out
        }
        known[node_id] = digest([node["class_type"], inputs])
    return known[node_id]


def _buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Buffers that a model's file has too: others may be filled as it runs."""
    for path, module in model.named_modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                yield f"{path}.{name}", buffer


def _others(functions: Mapping[str, Mapping[str, Any]]) -> object:
    """Other nodes' wrappers or callbacks, of a patcher's by kind and key."""
    return {
        kind: {key: [it for it in found if not is_ours(it)] for key, found in by_key.items()}
        for kind, by_key in functions.items()
    }


def is_ours(patch: object) -> bool:
    """Whether a patch or wrapper is one of this pack's."""
    module = getattr(patch, "__module__", None) or type(patch).__module__
    return str(module).startswith(__name__.rpartition(".")[0])
