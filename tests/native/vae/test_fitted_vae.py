"""VRAM Fit's VAE: core's own frames and latents in bands of any size, within what it predicts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from comfy_host.vae_case import VAECase

from ..conftest import Core, off_by
from .small_vaes import CASES, small_vae

pytestmark = pytest.mark.host
TOLERANCE = 1e-5
ON_DEVICE, OFFLOADED = {"workspace_bytes": 20_000}, {"workspace_bytes": 1, "maps_bytes": 0}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> VAECase:
    return CASES[request.param]


def fit_for(core: Core, vae: Any, usable_bytes: int = 2**40, **services: Any) -> Any:
    chosen: dict[str, Any] = {"check_cancelled": lambda: None, **services}
    services_of = core.native("services").Services
    return core.native("vae.fitted_vae").fitted_vae(vae, services_of(usable_bytes=lambda: usable_bytes, **chosen))[0]


def in_bands(core: Core, vae: Any, bands: dict[str, int], monkeypatch: pytest.MonkeyPatch, **services: Any) -> Any:
    """A fitted VAE that always runs in these bands."""
    only = (None, core.native("vae.bands").Bands(**bands))
    for module in ("vae.plan", "vae.passes"):
        monkeypatch.setattr(core.native(module), "CANDIDATES", only)
    return _never_plain(core, vae, services)


def _never_plain(core: Core, vae: Any, services: dict[str, Any]) -> Any:
    made = fit_for(core, vae, **services)
    plan = core.native("vae.plan").VAEPlan
    made.passes._planned = lambda _: plan(
        candidate=1, peak_bytes=2**20, stock_bytes=2**20, usable_bytes=2**40, weights_bytes=0
    )
    return made


def latent_of(case: VAECase, *, frames: int | None = None, batch: int = 1) -> torch.Tensor:
    _, channels, count, height, width = case.latent_shape
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, channels, frames or count, height, width, generator=generator)


def pixels_of(case: VAECase, frames: int) -> torch.Tensor:
    """Frames (F, H, W, C) whose sides the autoencoder has to crop."""
    height, width = (case.downscale * side + 3 for side in case.latent_shape[3:])
    return torch.rand(frames, height, width, 3, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("bands", [ON_DEVICE, OFFLOADED], ids=["on device", "offloaded"])
def test_bands_give_what_core_gives(
    core: Core, case: VAECase, bands: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    vae = small_vae(case)
    fit = in_bands(core, vae, bands, monkeypatch)
    assert isinstance(fit, type(vae))
    with torch.inference_mode():  # as core runs its nodes
        latent, pixels = latent_of(case, batch=2), pixels_of(case, 14)
        frames, encoded = vae.decode(latent), vae.encode(pixels)
        for decoded in (fit.decode(latent), fit.decode_tiled(latent, tile_x=4, tile_y=4, overlap=1)):
            assert off_by(decoded, frames) <= TOLERANCE
            assert decoded.stride() == frames.stride()
        for made in (fit.encode(pixels), fit.encode_tiled(pixels, tile_x=32, tile_y=32, overlap=8)):
            assert off_by(made, encoded) <= TOLERANCE
        one = latent_of(case, frames=1)
        assert off_by(fit.decode(one), vae.decode(one)) <= TOLERANCE
        assert off_by(fit.encode(pixels[:1]), vae.encode(pixels[:1])) <= TOLERANCE
        assert torch.equal(vae.decode(latent), frames), "the original is not what it was"
        assert torch.equal(vae.encode(pixels), encoded), "the original is not what it was"


def test_half_precision_changes_no_pixel(core: Core, monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES["wan-2.1"]
    vae = small_vae(case, torch.float16)
    fit = in_bands(core, vae, ON_DEVICE, monkeypatch)
    with torch.no_grad():
        latent = latent_of(case, frames=2)
        assert float((fit.decode(latent) - vae.decode(latent)).abs().max()) <= 1 / 255


def test_with_room_core_s_own_code_runs(core: Core, case: VAECase) -> None:
    vae, latent, pixels = small_vae(case), latent_of(case), pixels_of(case, 6)
    fit = fit_for(core, vae)
    with torch.no_grad():
        assert torch.equal(fit.decode(latent), vae.decode(latent))
        assert torch.equal(fit.encode(pixels), vae.encode(pixels))
    assert fit.passes.plan.bands is None


def test_with_less_it_takes_the_fastest_bands_that_fit_and_tells_core_what_they_need(
    core: Core, case: VAECase, monkeypatch: pytest.MonkeyPatch
) -> None:
    import comfy.model_management as management  # pyright: ignore[reportMissingImports]

    told: list[float] = []
    load = management.load_models_gpu

    def heard(models: Any, memory_required: float = 0, *args: Any, **kwargs: Any) -> Any:
        told.append(memory_required)
        return load(models, memory_required, *args, **kwargs)

    monkeypatch.setattr(management, "load_models_gpu", heard)
    vae, latent = small_vae(case), latent_of(case)
    weights_bytes = sum(it.nbytes for it in vae.first_stage_model.parameters())
    peak = fit_for(core, vae).passes._twin.decode_bytes
    stock_bytes = peak(tuple(latent.shape), None)
    with torch.no_grad():
        expected = vae.decode(latent)
        # On the CPU the frames lie in the device's memory too.
        fit = fit_for(core, vae, weights_bytes + expected.nbytes + stock_bytes // 2)
        told.clear()
        assert off_by(fit.decode(latent), expected) <= TOLERANCE
    plan = fit.passes.plan
    assert plan.bands is not None
    assert weights_bytes + plan.needed_bytes <= plan.usable_bytes
    faster = core.native("vae.bands").CANDIDATES[plan.candidate - 1]
    assert weights_bytes + peak(tuple(latent.shape), faster) * 1.05 > plan.usable_bytes
    assert told[0] == plan.needed_bytes


@pytest.mark.parametrize(
    ("bands", "latent_frames"),
    [(None, 2), (None, 9), (ON_DEVICE, 4), (OFFLOADED, 4)],
    ids=["core's own", "core's own, long", "on device", "offloaded"],
)
def test_the_twin_predicts_the_peak(
    core: Core, case: VAECase, bands: dict[str, int] | None, latent_frames: int
) -> None:
    library, native = core.library("memory.meter"), core.native("vae.bands")
    vae, latent = small_vae(case), latent_of(case, frames=latent_frames)
    model, cpu = vae.first_stage_model, torch.device("cpu")
    known = core.native("vae.model").native_vae(model)
    twin = core.native("vae.twin").VAETwin(known, model, torch.float32)
    chosen = None if bands is None else native.Bands(**bands)
    pixels = torch.zeros(1, 3, known.frames(latent_frames), *(case.downscale * side for side in latent.shape[3:]))
    video = core.native("vae.model").Video(
        frames=pixels.shape[2], height=pixels.shape[3], width=pixels.shape[4], read=lambda it: pixels[:, :, it].clone()
    )

    def banded() -> Any:
        return native.BandedPass(
            device=cpu, dtype=torch.float32, bands=chosen, runner=native.BandRunner(cpu, torch.float32)
        )

    def peak(run: Callable[[], Any]) -> int:
        with torch.no_grad(), library.fused_attention(), library.StorageMeter() as meter:
            run()
        return meter.peak_bytes

    if chosen is None:
        decoding = peak(lambda: model.decode(latent.clone()))
        encoding = peak(lambda: model.encode(pixels.clone()))
    else:
        decoding = peak(lambda: known.decode(model, latent, banded(), lambda *_: None))
        encoding = peak(lambda: known.encode(model, video, banded()))
    assert decoding <= twin.decode_bytes(tuple(latent.shape), chosen) <= 1.05 * decoding
    assert encoding <= twin.encode_bytes(tuple(pixels.shape), chosen) <= 1.05 * encoding


def test_out_of_memory_in_a_band_repeats_no_other_band(
    core: Core, case: VAECase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A device that holds only a part of what was planned: maps are offloaded and bands halved, frames are equal."""
    meter, native = core.library("memory.meter"), core.native("vae.bands")
    vae, latent, cpu = small_vae(case), latent_of(case), torch.device("cpu")
    model = vae.first_stage_model
    known = core.native("vae.model").native_vae(model)
    twin = core.native("vae.twin").VAETwin(known, model, torch.float32)
    large = native.Bands(workspace_bytes=2**30)
    problems: list[str] = []
    runner = native.BandRunner(cpu, torch.float32, problems.append)
    banded = native.BandedPass(
        device=cpu,
        dtype=torch.float32,
        bands=large,
        runner=runner,
        on_full=problems.append,
        on_maps=runner.maps.append,
        on_latent_frame=lambda: problems.append("a latent frame"),
    )
    with torch.no_grad():
        expected = model.decode(latent)
        result = torch.full_like(expected, torch.nan)
        highest, lowest = (twin.decode_bytes(tuple(latent.shape), it) for it in (large, native.Bands(**OFFLOADED)))
        limit_bytes = (highest + lowest) // 2
        with meter.StorageMeter(limit_bytes=limit_bytes):
            known.decode(model, latent, banded, lambda frames, rows, tile: result[0, :, frames, rows].copy_(tile))
    assert off_by(result, expected) <= TOLERANCE
    assert problems.count("a latent frame") == latent.shape[2]
    assert len(problems) > latent.shape[2]


def test_out_of_memory_in_core_s_own_code_goes_on_in_bands(core: Core, monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES["wan-2.1"]
    vae, latent = small_vae(case), latent_of(case)
    expected = vae.decode(latent)
    fit = fit_for(core, vae)

    def full(_: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError("a planted one")

    with torch.no_grad():
        fit.passes._planned(fit.passes._decoding(vae, latent, torch.empty(1, 3, 13, 40, 48)))
        monkeypatch.setattr(vae.first_stage_model, "decode", full)
        assert off_by(fit.decode(latent), expected) <= TOLERANCE
    assert fit.passes.plan.bands is not None
    assert any("a planted one" in note for note in fit.passes.notes)


def test_a_cancel_acts_within_a_latent_frame(core: Core, monkeypatch: pytest.MonkeyPatch) -> None:
    class CancelledError(Exception):
        pass

    bands = iter(range(10_000))

    def check() -> None:
        if next(bands) == 50:
            raise CancelledError

    case = CASES["wan-2.1"]
    vae, latent = small_vae(case), latent_of(case)
    fit = in_bands(core, vae, OFFLOADED, monkeypatch, check_cancelled=check)
    with torch.no_grad():
        expected = vae.decode(latent)
        with pytest.raises(CancelledError):
            fit.decode(latent)
        assert torch.equal(vae.decode(latent), expected)


def test_a_decode_that_cannot_fit_is_refused_before_sampling(
    core: Core, make_patcher: Callable[..., Any], sample: Callable[..., torch.Tensor]
) -> None:
    vae, patcher = small_vae(CASES["wan-2.1"]), make_patcher("wan-t2v")
    error = core.library("errors").DoesNotFitError
    fit = fit_for(core, vae, 20_000)
    with pytest.raises(
        error, match=r"decoding \d+×\d+×\d+ with the Wan 2.1 VAE needs .* use a smaller size, or a budget"
    ):
        fit.decode(latent_of(CASES["wan-2.1"]))
    services = core.native("services").Services(
        usable_bytes=lambda: 2**40,
        check_cancelled=lambda: None,
        check_latent=lambda shape: fit.passes.check_latent(fit, shape),
    )
    called: list[int] = []
    patcher.set_model_patch(lambda given: called.append(1) or {"img": given["img"]}, "double_block")
    with pytest.raises(error, match="decoding"):
        sample(core.native("fit").fitted(patcher, services)[0])
    assert not called


@pytest.mark.parametrize("alter", ["padding", "method", "class"])
def test_an_autoencoder_that_is_not_core_s_own_is_left_as_it_is(core: Core, alter: str) -> None:
    vae = small_vae(CASES["wan-2.1"])
    decoder = vae.first_stage_model.decoder
    if alter == "padding":
        decoder.upsamples[2].resample[1].padding_mode = "circular"
    elif alter == "method":
        decoder.forward = decoder.forward.__func__.__get__(decoder)
        decoder.middle[0].forward = lambda x, *_: x
    else:
        vae.first_stage_model = torch.nn.Linear(2, 2)
    services = core.native("services").Services(usable_bytes=lambda: 1, check_cancelled=lambda: None)
    fit, line = core.native("vae.fitted_vae").fitted_vae(vae, services)
    assert fit is vae
    assert "runs as it is" in line


def test_a_fitted_vae_is_fitted_anew_from_the_original(core: Core) -> None:
    vae = small_vae(CASES["wan-2.1"])
    once = fit_for(core, vae, 1)
    again = fit_for(core, once)
    assert again.original is vae
    assert again.patcher is vae.patcher
    assert type(vae) is not type(once) is type(again)
