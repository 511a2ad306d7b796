"""The Muon optimiser (Jordan et al. 2024): momentum with orthogonalised matrices.

Trains convolutions in about half the steps of AdamW, which keeps the vectors (norms, biases). The scale of the update
lets both optimisers share one learning rate (Liu et al. 2025).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn


class Muon(torch.optim.Optimizer):
    """Optimises parameters of two or more dimensions; a convolution counts as a matrix of (out, in × taps)."""

    def __init__(
        self, params: Iterable[nn.Parameter], lr: float, momentum: float = 0.95, weight_decay: float = 1e-2
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:
        if closure is not None:
            raise ValueError("Muon takes no closure")
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    self._update(weight, group["lr"], group["momentum"], group["weight_decay"])

    def _update(self, weight: torch.Tensor, lr: float, momentum: float, weight_decay: float) -> None:
        state = self.state[weight]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(weight)
        running = state["momentum"].lerp_(weight.grad, 1 - momentum)
        ahead = torch.lerp(weight.grad, running, momentum)
        matrix = orthogonal(ahead.flatten(1))
        scale = 0.2 * max(matrix.shape) ** 0.5
        weight.mul_(1 - lr * weight_decay).add_(matrix.view_as(weight), alpha=-lr * scale)


class MuonAdamW:
    """Muon for matrices and AdamW for the rest, stepped together."""

    def __init__(self, model: nn.Module, lr: float) -> None:
        matrices = [p for p in model.parameters() if p.ndim >= 2]
        vectors = [p for p in model.parameters() if p.ndim < 2]
        self._lr = lr
        self._optimizers = (Muon(matrices, lr), torch.optim.AdamW(vectors, lr, betas=(0.9, 0.98), weight_decay=0.0))

    def step(self, factor: float) -> None:
        """Take one step at the given factor of the learning rate, and clear the gradients."""
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                group["lr"] = factor * self._lr
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def state_dict(self) -> dict[str, Any]:
        return {str(index): optimizer.state_dict() for index, optimizer in enumerate(self._optimizers)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for index, optimizer in enumerate(self._optimizers):
            optimizer.load_state_dict(state[str(index)])


def orthogonal(matrix: torch.Tensor, rounds: int = 5) -> torch.Tensor:
    """Approximate the nearest matrix with equal singular values, by Newton and Schulz's quintic iteration."""
    # Jordan et al.'s coefficients: in five rounds they bring every singular value near 1, without converging exactly.
    a, b, c = 3.4445, -4.7750, 2.0315
    wide = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    x = (wide / (wide.norm() + 1e-7)).bfloat16()
    for _ in range(rounds):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    x = x.to(matrix.dtype)
    return x.T if matrix.shape[0] > matrix.shape[1] else x
