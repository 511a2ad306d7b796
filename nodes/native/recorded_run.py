"""The calls of one run of a sampler: each is answered from the record of an earlier run, or made and recorded.

The record lies beneath all that other nodes put around the model: their wrappers, such as EasyCache's, see every call
and its result, and come to the same state as in the run that was cut short.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from threading import Lock
from typing import Any

import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor, nn

from ...i2v_core.sampling.call_record import CallRecord
from ...i2v_core.sampling.checkpoint import CheckpointTimer
from ...i2v_core.sampling.digest import digest
from ...i2v_core.sampling.record_file import Record
from .call_shapes import first_tensor
from .compiling import itself_uncompiled, uncompiled
from .model import is_own_method
from .run_identity import is_ours, model_identity

logger = logging.getLogger(__name__)

_UNKNOWABLE = (RuntimeError, TypeError, ValueError, KeyError, AttributeError)
"""Errors of reading other nodes' objects; what cannot be told from others is not recorded."""
_OF_BRANCHES = ("cond_or_uncond", "uuids")
"""Options of a call that list its guidance branches; the second names them anew in each run."""
_LIST = "list"
"""Fact of a call's record: whether the model returned a list of tensors."""


class KnownModel:
    """A diffusion model of a run, with its identity."""

    def __init__(self, patcher: ModelPatcher, object_levels: int) -> None:
        self.model: nn.Module = patcher.model.diffusion_model
        self.identity = model_identity(patcher, object_levels=object_levels)
        self._children = _children(self.model)

    def replaced_part(self) -> str | None:
        """The name of a part in which another node may keep state between calls, beneath the record."""
        for name, now in self.model.__dict__.items():
            is_method = callable(getattr(type(self.model), name, None))
            if is_method and not is_own_method(self.model, name) and not is_ours(now):
                return name
        now = _children(self.model)
        return next((name for name, child in self._children.items() if now.get(name) is not child), None)


def known_models(guider: Any, object_levels: int) -> list[KnownModel]:
    """The diffusion models that a guider runs; its own comes first."""
    own: ModelPatcher = guider.model_patcher
    others = [it for it in vars(guider).values() if isinstance(it, ModelPatcher) and it is not own]
    copies = own.additional_models.get("multigpu", ())
    return [KnownModel(it, object_levels) for it in (own, *others, *copies) if hasattr(it.model, "diffusion_model")]


@dataclass(frozen=True, slots=True)
class _Call:
    """One call of a model, known by its inputs."""

    names: Sequence[str]
    """For each guidance branch in the call, a hash of its inputs with the number of calls before that had the same."""
    hashes: Sequence[str]
    rows: int
    """The batch of all branches."""
    step: int
    """Number of the sampler's step, from 1."""
    device: torch.device

    def branches(self) -> Iterator[tuple[str, slice]]:
        """The branches' names and rows."""
        size = self.rows // len(self.names)
        for index, name in enumerate(self.names):
            yield name, slice(index * size, (index + 1) * size)


class RecordedRun:
    """The calls of one run.

    Args:
        models: those that the run may call.
        sigmas: the sampler's schedule, which tells how much of the run is done.
        note: takes a line for the user.
    """

    def __init__(
        self,
        models: Iterable[KnownModel],
        sigmas: Tensor,
        record: CallRecord,
        timer: CheckpointTimer,
        note: Callable[[str], None],
    ) -> None:
        self._models = {id(it.model): it for it in models}
        self._sigmas: list[float] = sigmas.flatten().tolist()
        self._record, self._timer, self._note = record, timer, note
        self._lock = Lock()  # copies of a model on several cards are called at once
        self._step = 0
        self._done: Counter[str] = Counter()
        self._answered, self._made = 0, 0
        self._noted: set[str] = set()

    @property
    def is_worthwhile(self) -> bool:
        """Whether the calls that were made are worth keeping."""
        return self._timer.is_worthwhile(self._step)

    @itself_uncompiled
    def diffusion_model(self, executor: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
        """One call, around which are other nodes' wrappers."""
        call = self._call(executor.class_obj, x, args, kwargs)
        if call is None:
            return executor(x, *args, **kwargs)
        found = self._found(call)
        return self._kept(call, executor(x, *args, **kwargs)) if found is None else found

    def save(self) -> bool:
        """Writes the calls of a run that was cut short, if they are worth it; whether there are any on disk."""
        with self._lock:
            if self.is_worthwhile:
                self._write()
            return bool(self._record)

    def finish(self) -> None:
        """Tells of calls that were answered, if none was made after them."""
        if not self._made:
            self._tell_answered()

    @uncompiled
    def _call(self, model: nn.Module, x: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> _Call | None:
        """The call by its inputs; None for one that is made as if there were no record."""
        known = self._models.get(id(model))
        options = next((it for it in (kwargs.get("transformer_options"), *args) if _is_options(it)), None)
        if known is None or options is None:
            return None
        replaced = known.replaced_part()
        if replaced is not None:
            self._note_once(f"not all calls are recorded: another node has replaced {replaced} of the model")
            return None
        try:
            sigma = float(options["sigmas"].max())
            step = min(sum(it > sigma for it in self._sigmas) + 1, len(self._sigmas) - 1)
            rows, device = first_tensor(x).shape[0], first_tensor(x).device
            names = _names(known.identity, x, args, kwargs, options)
        except _UNKNOWABLE as error:
            logger.info("a call is not recorded, since it cannot be told from others: %r", error)
            return None
        # Another node's functions may act in another way each time. What they do follows from the calls before.
        return _Call([f"{name}-{self._done[name]}" for name in names], names, rows, step, device)

    @uncompiled
    def _found(self, call: _Call) -> Any:
        """Returns what an earlier run's call did; None where a branch of it is missing."""
        with self._lock:
            found = [record for name in call.names if (record := self._record.find(name)) is not None]
            if len(found) < len(call.names):
                if not self._made:
                    self._begin(call)
                return None
            self._done.update(call.hashes)
            self._answered += 1
        names = sorted(found[0].tensors, key=int)
        tensors = [torch.cat([it.tensors[name] for it in found]).to(call.device) for name in names]
        return tensors if found[0].facts[_LIST] else tensors[0]

    def _begin(self, call: _Call) -> None:
        """Counts the time from the first call that is made."""
        self._timer.start(call.step - 1)
        self._tell_answered()

    @uncompiled
    def _kept(self, call: _Call, output: Any) -> Any:
        """The output, which is recorded."""
        output = _contiguous(output)
        with self._lock:
            self._done.update(call.hashes)
            self._made, self._step = self._made + 1, max(self._step, call.step)
            for name, record in _records(call, output):
                self._note_problem(self._record.add(name, record))
            if self._timer.is_due(self._step):
                self._write()
        return output

    def _write(self) -> None:
        self._note_problem(self._record.write())
        self._timer.written()

    def _tell_answered(self) -> None:
        if self._answered:
            self._note_once(f"resumed: {self._answered} calls of the model were answered by an earlier run's record")

    def _note_problem(self, problem: str | None) -> None:
        if problem is not None:
            self._note_once(f"no more calls are recorded, sampling continues: {problem}")

    def _note_once(self, line: str) -> None:
        if line not in self._noted:
            self._noted.add(line)
            self._note(line)


def _is_options(value: object) -> bool:
    """Whether an argument is the options that core's sampling gives to a call."""
    return isinstance(value, dict) and "cond_or_uncond" in value and isinstance(value.get("sigmas"), Tensor)


def _names(
    identity: str, x: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], options: Mapping[str, Any]
) -> list[str]:
    """A hash of the inputs of each guidance branch: equal whether branches run together or one after another."""
    named = {name: it for name, it in kwargs.items() if it is not options}
    inputs = [x, [it for it in args if it is not options], named]
    shared = {name: it for name, it in options.items() if name not in _OF_BRANCHES}
    branches, rows = list(options["cond_or_uncond"]), first_tensor(x).shape[0]
    if rows % len(branches):
        return [digest([identity, branches, shared, inputs])]
    size = rows // len(branches)
    return [
        digest([identity, branch, shared, _rows(inputs, rows, slice(index * size, (index + 1) * size))])
        for index, branch in enumerate(branches)
    ]


def _rows(value: Any, rows: int, part: slice) -> Any:
    """A value with some rows of those tensors that have one for each of the batch."""
    if isinstance(value, Tensor):
        return value[part] if value.ndim and value.shape[0] == rows else value
    if isinstance(value, (list, tuple)):
        return [_rows(it, rows, part) for it in value]
    if isinstance(value, Mapping):
        return {name: _rows(it, rows, part) for name, it in value.items()}
    return value


def _records(call: _Call, output: Any) -> Iterator[tuple[str, Record]]:
    """The output by branches; nothing where it is not made of tensors with a row for each of the batch."""
    tensors = output if isinstance(output, list) else [output]
    if all(isinstance(it, Tensor) and it.ndim and it.shape[0] == call.rows for it in tensors):
        for name, part in call.branches():
            kept = {str(index): it[part].detach().to("cpu", copy=True) for index, it in enumerate(tensors)}
            yield name, Record(kept, {_LIST: isinstance(output, list)})


def _contiguous(output: Any) -> Any:
    """The output in the layout in which it would be answered: sums over it depend on that in their last bits."""
    if isinstance(output, (list, tuple)):
        return [_contiguous(it) for it in output]
    return output.contiguous() if isinstance(output, Tensor) else output


def _children(model: nn.Module) -> dict[str, nn.Module | None]:
    """The parts of a model; those of torch.compile count as what they compile."""
    return {name: getattr(child, "_orig_mod", child) for name, child in model._modules.items()}
