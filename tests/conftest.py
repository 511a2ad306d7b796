"""Fixtures of small real models (`subjects`), and configuration of all tests."""

from __future__ import annotations

import gc
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.subjects import SUBJECTS, Subject


def pytest_configure() -> None:
    """Divide the cores among test processes: more threads than cores would wait for each other."""
    processes = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    if processes > 1:
        torch.set_num_threads(max(1, torch.get_num_threads() // processes))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests that need a CUDA device if there is none."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


SCREENSHOTS = Path(__file__).resolve().parents[1] / "build" / "screenshots"
FAULTS = pytest.StashKey[Counter[str]]()


@pytest.fixture(scope="session")
def survived(pytestconfig: pytest.Config) -> Counter[str]:
    """Count of injected faults that were survived, by kind. Printed after all tests."""
    return pytestconfig.stash.setdefault(FAULTS, Counter())


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Hand a worker process's count of faults to the main process."""
    output = getattr(session.config, "workeroutput", None)
    if output is not None:
        output["faults"] = dict(session.config.stash.get(FAULTS, Counter[str]()))


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: object) -> None:
    node.config.stash.setdefault(FAULTS, Counter()).update(getattr(node, "workeroutput", {}).get("faults", {}))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    faults = config.stash.get(FAULTS, Counter[str]())
    if faults:
        kinds = ", ".join(f"{count} {kind}" for kind, count in faults.most_common())
        terminalreporter.write_line(f"faults tried and survived: {faults.total()} ({kinds})")
    if SCREENSHOTS.is_dir():
        terminalreporter.write_line(f"screenshots of the page: {SCREENSHOTS}")


@pytest.fixture(scope="module", autouse=True)
def frozen_imports() -> None:
    """Keeps the garbage collector from walking through what is imported, about a million objects: 0.5 s each time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Run on one thread: more slow tiny operations down."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def save_tiny_model() -> Callable[..., None]:
    """Return a function that saves a small I2VGen-XL to a folder."""
    return SUBJECTS["i2vgen-xl"].save


@pytest.fixture(scope="session")
def tiny_models() -> Mapping[str, Callable[..., None]]:
    """Return functions that save a small model to a folder, by the subject's name."""
    return {name: it.save for name, it in SUBJECTS.items()}


@pytest.fixture(scope="session")
def save_wan() -> Callable[..., None]:
    """Return a function that saves a small Wan to a folder: 2.1, or another `layout`."""
    return SUBJECTS["wan2.1-i2v"].save


@pytest.fixture(scope="session", params=SUBJECTS)
def subject(request: pytest.FixtureRequest) -> Subject:
    """Parametrise a test over all models."""
    return SUBJECTS[request.param]


@pytest.fixture(scope="session")
def model_folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return the folder of a small model by the subject's name. All tests share it: copy it before changing it."""

    @cache
    def folder_of(name: str) -> Path:
        folder = tmp_path_factory.mktemp("models") / name
        SUBJECTS[name].save(folder)
        return folder

    return folder_of


@pytest.fixture(scope="session")
def subject_folder(subject: Subject, model_folders: Callable[[str], Path]) -> Path:
    return model_folders(subject.name)


@pytest.fixture(scope="session", params=[name for name in SUBJECTS if name.startswith("wan")])
def wan_folder(request: pytest.FixtureRequest, model_folders: Callable[[str], Path]) -> Path:
    """A small Wan of each layout."""
    return model_folders(request.param)


@pytest.fixture(scope="session")
def tiny_folder(model_folders: Callable[[str], Path]) -> Path:
    """A small I2VGen-XL."""
    return model_folders("i2vgen-xl")
