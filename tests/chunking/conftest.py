"""Small denoisers of the real architectures, and inputs for them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from tests.subjects import DenoiserSubject, Inputs, Subject


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Use one thread, since more would slow tiny operations down."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def kind(subject: Subject) -> DenoiserSubject:
    return subject.denoiser


@pytest.fixture(scope="session")
def make_denoiser(kind: DenoiserSubject) -> Callable[..., Any]:
    return kind.make


@pytest.fixture(scope="session")
def denoiser(kind: DenoiserSubject) -> Any:
    """Return a denoiser that tests share, and must not change."""
    return kind.make()


@pytest.fixture(scope="session")
def make_inputs(kind: DenoiserSubject) -> Callable[..., Inputs]:
    return kind.inputs
