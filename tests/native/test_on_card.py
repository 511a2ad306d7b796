"""Planned calls on an emulated CUDA card: within their prediction, measured, and made again when memory runs out."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from tests.emulated_cuda import CARD, EmulatedCard, emulated_cuda

from .conftest import CASE, TOLERANCE, Core, off_by

pytestmark = pytest.mark.host
MIB = 2**20
TOO_LITTLE_BYTES = 256 * 1024
"""Less than any call of the small models takes."""


class CardRun:
    """A small model on a card with its first call, by a plan for a budget of its own."""

    def __init__(self, core: Core, patcher: Any, **services: Any) -> None:
        import comfy.sampler_helpers as helpers  # pyright: ignore[reportMissingImports]
        from comfy.ldm.modules import attention  # pyright: ignore[reportMissingImports]

        case, self.fit = patcher.get_attachment(CASE), core.native("fit")
        self.core, self.patcher, self.model = core, patcher, patcher.model.diffusion_model
        generator = torch.Generator().manual_seed(0)
        conds = {"positive": helpers.convert_cond([case.conditioning(generator, case.latent_shape)])}
        shapes = core.recorded_calls(patcher, conds)[0].call

        def real(value: Any) -> Any:
            if not isinstance(value, torch.Tensor):
                return value
            return torch.rand(value.shape, generator=generator).to(value.dtype)

        self.first = real(shapes.first)
        self.arguments = {name: real(value) for name, value in shapes.arguments.items()}
        self.options = {"optimized_attention_override": lambda _, *args, **kwargs: fused(*args, **kwargs)}
        self.shapes, fused = shapes, attention.attention_pytorch.__wrapped__
        self.services = services
        with torch.no_grad():
            self.expected = self.model(self.first, **self.arguments, transformer_options=self.options)

    def plan(self, peak_share: float) -> Any:
        """The plan for weights that stay, and this share of the peak of core's own call."""
        planner = self.core.native("call_planner").CallPlanner(
            self.core.native("model").native_model(self.model), self.patcher.model, torch.device("cpu")
        )
        planner.look_at(replaced_attention=False, patched=())
        stock_bytes = planner.peak(self.shapes)(None)
        return planner.plan(self.shapes, planner.weights_bytes + int(peak_share * stock_bytes))

    @contextmanager
    def on_card(self, free_bytes: int) -> Generator[tuple[EmulatedCard, Any, Callable[[], torch.Tensor]]]:
        """The card with the model on it and so much free beside, its fit, and what makes the call."""
        clone, _ = self.fit.fitted(
            self.patcher,
            self.fit.Services(check_cancelled=lambda: None, **{"usable_bytes": lambda: 2**40, **self.services}),
        )
        fitted = clone.get_attachment(self.fit.KEY)
        with emulated_cuda(64 * MIB) as card, torch.no_grad():
            self.model.to(CARD)
            first = self.first.to(CARD)
            arguments = {n: it.to(CARD) if isinstance(it, torch.Tensor) else it for n, it in self.arguments.items()}
            card.limit_bytes = card.used_bytes + free_bytes
            clone.patch_model(load_weights=False)
            try:
                yield card, fitted, lambda: self.model(first, **arguments, transformer_options=self.options)
            finally:
                clone.unpatch_model(unpatch_weights=False)
                self.model.to("cpu")


@pytest.fixture
def make_run(core: Core, make_patcher: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> Callable[..., CardRun]:
    from comfy.ldm.modules import attention  # pyright: ignore[reportMissingImports]

    # The host was told to run on the CPU, where it would choose another attention to predict for.
    predict = core.native("attention_memory").attention_output
    fused = attention.attention_pytorch.__wrapped__
    monkeypatch.setattr(
        core.native("call_planner"), "attention_output", lambda _, *args, **kwargs: predict(fused, *args, **kwargs)
    )
    return lambda name, **services: CardRun(core, make_patcher(name), **services)


@pytest.mark.parametrize("peak_share", [1.1, 0.7])
def test_a_planned_call_keeps_to_its_plan(make_run: Callable[..., CardRun], peak_share: float) -> None:
    run = make_run("wan-i2v")
    plan = run.plan(peak_share)
    assert (plan.workspace_bytes is None) == (peak_share > 1)
    with run.on_card(plan.needed_bytes) as (card, fitted, call):
        fitted._plans[run.shapes.key] = plan
        before_bytes = card.used_bytes
        card.reset_peak()
        result = call()
        taken_bytes = card.peak_bytes - before_bytes
        assert taken_bytes <= plan.peak_bytes <= 1.05 * taken_bytes
        assert off_by(result.cpu(), run.expected) <= TOLERANCE
        assert list(fitted._record.predicted_and_measured()) == [(plan.peak_bytes, taken_bytes)]
        report = fitted._record.report((1,))
    assert report["measured_peak_bytes"] == taken_bytes
    assert max(report["timeline"]["peaks_bytes"]) == taken_bytes


def test_a_call_that_runs_out_of_memory_is_made_again_in_smaller_chunks(
    core: Core, make_run: Callable[..., CardRun]
) -> None:
    """An allocation of the card fails, at a capacity below what the plan was made for."""
    said: list[str] = []
    run = make_run("wan-i2v", say=said.append)
    unchunked, chunked = run.plan(1.1), run.plan(0.7)
    with run.on_card(chunked.needed_bytes) as (card, fitted, call):
        result = call()
        assert off_by(result.cpu(), run.expected) <= TOLERANCE
        assert card.peak_bytes <= card.limit_bytes
        figures = core.library("run_report").StageFigures.from_dict(fitted._record.report((1,)))
    assert any("ran out of memory" in line for line in said)
    assert figures.retries >= 1
    assert figures.measured_peak_bytes <= chunked.needed_bytes < unchunked.peak_bytes


def test_out_of_memory_at_the_finest_is_an_error_with_a_remedy(core: Core, make_run: Callable[..., CardRun]) -> None:
    run = make_run("wan-t2v")
    with (
        run.on_card(TOO_LITTLE_BYTES) as (_, _, call),
        pytest.raises(core.library("errors").RanOutError, match="use a smaller"),
    ):
        call()
