"""Small denoisers of the real architectures, and inputs for them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from tests.chunking.subjects import SUBJECTS, Inputs, Subject


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Many threads slow tiny operations down."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session", params=SUBJECTS)
def subject(request: pytest.FixtureRequest) -> Subject:
    return SUBJECTS[request.param]


@pytest.fixture(scope="session")
def make_unet(subject: Subject) -> Callable[..., Any]:
    return subject.make


@pytest.fixture(scope="session")
def unet(subject: Subject) -> Any:
    """Shared by tests, which must leave it as it is."""
    return subject.make()


@pytest.fixture(scope="session")
def make_inputs(subject: Subject) -> Callable[..., Inputs]:
    return subject.inputs


@pytest.fixture(scope="session")
def relative_rms() -> Callable[[torch.Tensor, torch.Tensor], float]:
    """The root mean square of the difference, relative to that of the reference (second)."""

    def measure(result: torch.Tensor, reference: torch.Tensor) -> float:
        difference = result.double() - reference.double()
        return (difference.square().mean() / reference.double().square().mean()).sqrt().item()

    return measure
