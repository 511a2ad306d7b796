"""Fixtures and an emulated card for tests of batches."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from i2v_core.batch.jobs.job import JobSpec
from i2v_core.batch.jobs.store import JobStore
from i2v_core.families import Architecture, I2VModel, VideoSize, load_model
from i2v_core.memory.device import DeviceFacts, device_facts
from i2v_core.memory.device_memory import DeviceMemory
from i2v_core.memory.meter import StorageMeter
from i2v_core.memory.stage_meter import CountingStageMeter, StageMeter
from i2v_core.placement.attention import AttentionBackend
from i2v_core.planning.plan import Plan, Stage
from i2v_core.planning.request import Budget
from i2v_core.stages import StageReport

MakeSpec = Callable[[int], JobSpec]


@dataclass
class Clock:
    """A clock in seconds since the epoch, which tests set."""

    now: float = 1_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store(tmp_path: Path, clock: Clock) -> Iterator[JobStore]:
    opened = JobStore(tmp_path / "jobs.queue", clock)
    yield opened
    opened.close()


@pytest.fixture
def make_spec() -> MakeSpec:
    """Makes jobs that differ in their seed."""
    spec = JobSpec(
        model=Path("model"),
        image=Path("a.png"),
        prompt="x",
        size=VideoSize(width_pixels=64, height_pixels=64, frames=2),
        steps=2,
        cfg=4.0,
        fps=8.0,
    )
    return lambda seed: replace(spec, seed=seed)


class SharedCard:
    """A card of so many bytes that all stages on it share, each counted in its own thread.

    An operation that would take more fails with a true `torch.OutOfMemoryError`. `fail_chance` of the operations do so
    for no reason; `highest_bytes` is the most that was ever in use.
    """

    def __init__(self, limit_bytes: int, fail_chance: float = 0.0, seed: int = 0) -> None:
        self.limit_bytes, self.fail_chance = limit_bytes, fail_chance
        self.highest_bytes = self.injected = self.most_together = 0
        self._meters: list[_CardMeter] = []
        self._turn = threading.Lock()
        self._random = random.Random(seed)

    @contextmanager
    def meter(self, device: torch.device) -> Iterator[StageMeter]:
        with _CardMeter(self, device.type) as storages:
            meter = CountingStageMeter(device, storages)
            with self._turn:
                self._meters.append(storages)
                self.most_together = max(self.most_together, len(self._meters))
            try:
                yield meter
            finally:
                meter.stop()
                with self._turn:
                    self._meters.remove(storages)

    def limit_of(self, one: _CardMeter) -> int:
        """Bytes that the card leaves to one stage now."""
        with self._turn:
            used = {meter: meter.current_bytes for meter in self._meters}
            self.highest_bytes = max(self.highest_bytes, sum(used.values()))
            if self.fail_chance and self._random.random() < self.fail_chance:
                self.injected += 1
                return 0
            return self.limit_bytes - sum(size for meter, size in used.items() if meter is not one)


class _CardMeter(StorageMeter):
    def __init__(self, card: SharedCard, device_type: str) -> None:
        self._card = card
        super().__init__(device_type=device_type)

    @property
    def limit_bytes(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self._card.limit_of(self)

    @limit_bytes.setter
    def limit_bytes(self, _: object) -> None:
        pass


_card: ContextVar[SharedCard | None] = ContextVar("card", default=None)


@dataclass(kw_only=True)
class EmulatedDevice:
    """A `BatchDevice` on the CPU whose memory is a `SharedCard`."""

    card: SharedCard
    name: str = "card"
    others_bytes: int = 0
    """Held by other programs."""
    before_stage: Callable[[Stage, Plan], None] = lambda _, __: None
    """Called in the thread of each stage once it is admitted."""
    concluded_alone: list[bool] = field(default_factory=list[bool])
    torch_device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    attention: AttentionBackend = AttentionBackend.SDPA

    def budget(self, architecture: Architecture) -> Budget:
        return Budget(free_bytes=self.card.limit_bytes)

    def facts(self, architecture: Architecture) -> DeviceFacts:
        return device_facts(self.torch_device)

    def room(self) -> DeviceMemory:
        return DeviceMemory(free_bytes=self.card.limit_bytes - self.others_bytes, others_bytes=self.others_bytes)

    @contextmanager
    def stage(self, stage: Stage, plan: Plan) -> Iterator[None]:
        self.before_stage(stage, plan)
        token = _card.set(self.card)
        try:
            yield
        finally:
            _card.reset(token)

    def make_room(self) -> None:
        pass

    def free_bytes(self) -> int | None:
        return None

    def concluded(self, report: StageReport, *, alone: bool) -> None:
        self.concluded_alone.append(alone)


@contextmanager
def on_shared_card() -> Iterator[None]:
    """Makes stages run on the emulated card of their device while the context lasts."""

    @contextmanager
    def on_card(device: torch.device) -> Iterator[StageMeter]:
        card = _card.get()
        assert card is not None, "a stage runs outside of any device"
        with card.meter(device) as meter:
            yield meter

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("i2v_core.stages.run.stage_meter", on_card)
        yield


@pytest.fixture
def emulated() -> Iterator[None]:
    with on_shared_card():
        yield


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of small pictures."""
    folder = tmp_path_factory.mktemp("pictures")
    for index in range(3):
        Image.new("RGB", (80, 72), (80 * index, 30, 90)).save(folder / f"{index}.png")
    return folder


@pytest.fixture(scope="session")
def tiny_model(tiny_folder: Path) -> I2VModel:
    return load_model(tiny_folder)


MakeJob = Callable[..., JobSpec]


@pytest.fixture
def make_job(tiny_folder: Path, pictures: Path) -> MakeJob:
    """Makes short jobs of the tiny model."""

    def make(seed: int = 0, **changes: object) -> JobSpec:
        spec = JobSpec(
            model=tiny_folder,
            image=pictures / f"{seed % 3}.png",
            image_digest=f"picture {seed % 3}",
            prompt="a red circle",
            size=VideoSize(width_pixels=64, height_pixels=64, frames=2),
            steps=2,
            cfg=4.0,
            fps=8.0,
            precision="fp32",
            seed=seed,
            quality=40,
        )
        return replace(spec, **changes)  # pyright: ignore[reportArgumentType]

    return make
