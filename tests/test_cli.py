"""`python -m i2v_core`: exit codes, JSON keys, texts, and bounds of the published model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from i2v_core.cli import main
from i2v_core.units import GIB, MIB
from tests.marking import first_quick

KEYS = {"fits", "plan", "stages", "peak_bytes", "binding_stage", "reasons", "nearest"}
SMALL = ("--width", "512", "--height", "512", "--frames", "16")
LARGE = ("--width", "1024", "--height", "1024", "--frames", "32")

Captured = pytest.CaptureFixture[str]


def run_json(capsys: Captured, *arguments: str) -> tuple[int, Any]:
    """Return the exit code and the parsed answer."""
    code = main([*arguments, "--json"])
    return code, json.loads(capsys.readouterr().out)


def test_a_plan_that_fits_as_json(capsys: Captured) -> None:
    code, answer = run_json(capsys, "plan", *SMALL, "--vram", "8GiB")
    assert code == 0
    assert set(answer) == KEYS
    assert answer["fits"] is True
    assert answer["nearest"] is None
    assert [it["stage"] for it in answer["stages"]] == ["encode", "sample", "decode"]
    for stage in answer["stages"]:
        assert set(stage) >= {"stage", "weights_bytes", "activation_bytes", "peak_bytes"}
        assert stage["peak_bytes"] == stage["weights_bytes"] + stage["activation_bytes"]
        assert 0 < stage["peak_bytes"] <= 8 * GIB
    binding = max(answer["stages"], key=lambda it: it["peak_bytes"])
    assert (answer["binding_stage"], answer["peak_bytes"]) == (binding["stage"], binding["peak_bytes"])
    assert answer["reasons"]
    assert answer["plan"]["precision"] == "fp16"
    assert answer["plan"]["guidance"] is True


def test_a_refusal_as_json_names_what_would_fit(capsys: Captured) -> None:
    code, answer = run_json(capsys, "plan", *LARGE, "--vram", "700MiB")
    assert code == 3
    assert set(answer) == KEYS
    assert (answer["fits"], answer["plan"], answer["stages"]) == (False, None, [])
    assert answer["binding_stage"] in ("encode", "sample", "decode")
    assert answer["peak_bytes"] > 700 * MIB
    assert answer["reasons"]
    near = answer["nearest"]
    assert near["budget_bytes"] > 700 * MIB
    assert run_json(capsys, "plan", *LARGE, "--vram", f"{near['budget_bytes']}B")[0] == 0
    smaller = ("--width", str(near["width"]), "--height", str(near["height"]), "--frames", "32")
    assert run_json(capsys, "plan", *smaller, "--vram", "700MiB")[0] == 0


def test_more_memory_never_costs_more_time(capsys: Captured) -> None:
    """Cover streamed to resident weights, and chunked to unchunked layers."""
    plans = [run_json(capsys, "plan", *SMALL, "--vram", vram)[1]["plan"] for vram in ("2GiB", "4GiB", "12GiB")]
    assert ["sample" in plan["streamed"] for plan in plans] == [True, False, False]
    assert [plan["workspace_bytes"] is None for plan in plans] == [False, False, True]


def test_without_guidance_a_plan_takes_less(capsys: Captured) -> None:
    guided, unguided = (
        run_json(capsys, "plan", *SMALL, "--vram", "16GiB", *more)[1]["stages"][1]["activation_bytes"]
        for more in ((), ("--no-guidance",))
    )
    assert unguided == pytest.approx(guided / 2, rel=0.02)


def test_streaming_needs_host_memory_for_a_second_copy_of_the_weights(capsys: Captured) -> None:
    small_card = ("plan", *SMALL, "--vram", "2GiB")
    assert run_json(capsys, *small_card, "--ram", "16GiB")[0] == 0
    assert run_json(capsys, *small_card, "--ram", "5GiB")[0] == 3


def test_where_nothing_exact_fits_approximate_plans_are_named_and_made_if_allowed(capsys: Captured) -> None:
    """Plan for a card on which weights would have to stream, with too little host memory to stream from."""
    short = ("plan", *SMALL, "--vram", "2GiB", "--ram", "5GiB")
    code, refusal = run_json(capsys, *short)
    assert code == 3
    assert refusal["nearest"]["approximation"] in ("int8 weights", "fp8 weights")
    code, answer = run_json(capsys, *short, "--allow-approximate")
    assert code == 0
    assert answer["plan"]["weight_storage"] + " weights" == refusal["nearest"]["approximation"]
    assert any("not exactly" in reason for reason in answer["reasons"])
    roomy = run_json(capsys, "plan", *SMALL, "--vram", "8GiB", "--allow-approximate")[1]
    assert roomy["plan"]["weight_storage"] == "as computed"


@pytest.mark.parametrize(("vram", "code", "words"), [("8GiB", 0, "fits"), ("700MiB", 3, "does not fit")])
def test_the_answer_in_words(capsys: Captured, vram: str, code: int, words: str) -> None:
    assert main(["plan", *LARGE, "--vram", vram]) == code
    text = capsys.readouterr().out
    assert words in text
    assert "1024×1024×32" in text
    assert "GiB" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--width", "1000", "--height", "1023", "--frames", "16", "--vram", "8GiB"), "divisible by 8"),
        ((*SMALL, "--vram", "much"), "'much' is not an amount of memory"),
        ((*SMALL, "--vram", "0"), "not possible"),
        ((*SMALL, "--vram", "8", "--ram", "some"), "'some' is not an amount of memory"),
        (("--width", "512", "--height", "512", "--frames", "0", "--vram", "8GiB"), "at least 1 frame"),
    ],
)
def test_values_that_cannot_be_are_refused_with_the_remedy(
    capsys: Captured, arguments: tuple[str, ...], message: str
) -> None:
    assert main(["plan", *arguments]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert "Remedy" in captured.err
    assert not captured.out


@pytest.mark.parametrize(
    "arguments", [(), ("plan",), ("plan", *SMALL), ("plan", *SMALL, "--vram", "8", "--model", "x")]
)
def test_arguments_that_are_missing_or_unknown_exit_with_2(capsys: Captured, arguments: tuple[str, ...]) -> None:
    with pytest.raises(SystemExit) as raised:
        main(arguments)
    assert raised.value.code == 2
    assert "usage" in capsys.readouterr().err


def test_the_published_model_stays_within_its_bounds(capsys: Captured) -> None:
    """Sampling in fp16 with guidance: weights and live tensors, in GiB."""
    bounds_gib = {
        (512, 512, 16): (3.1, 1.2),
        (768, 768, 24): (4.3, 2.2),
        (1280, 704, 16): (3.95, 1.8),
        (1024, 1024, 32): (5.7, 3.5),
    }
    code, rows = run_json(capsys, "memory-table")
    assert code == 0
    assert [(row["width"], row["height"], row["frames"]) for row in rows] == list(bounds_gib)
    for row, (resident_gib, streamed_gib) in zip(rows, bounds_gib.values(), strict=True):
        assert row["resident_bytes"] <= resident_gib * GIB < row["stock_bytes"]
        assert row["streamed_bytes"] <= streamed_gib * GIB
        assert 0 < row["decode_bytes"] < row["resident_bytes"]


def test_the_table_in_words_says_that_it_is_traced(capsys: Captured) -> None:
    assert main(["memory-table"]) == 0
    text = capsys.readouterr().out
    assert all(word in text for word in ("stock", "resident", "streamed", "decode", "1280×704×16", "traced"))


def test_it_runs_as_a_module() -> None:
    command = [sys.executable, "-m", "i2v_core", "plan", *SMALL, "--vram", "nothing"]
    root = Path(__file__).parents[1]
    finished = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=120, check=False)
    assert finished.returncode == 2
    assert "Remedy" in finished.stderr


@pytest.mark.parametrize(
    ("width", "height", "frames", "resident_gib", "streamed_gib", "decode_gib"), [(1024, 576, 25, 4.6, 2.2, 1.4)]
)
def test_stable_video_diffusion_stays_within_its_bounds(
    capsys: Captured,
    width: int,
    height: int,
    frames: int,
    resident_gib: float,
    streamed_gib: float,
    decode_gib: float,
) -> None:
    code, rows = run_json(capsys, "memory-table", "--model", "svd")
    assert code == 0
    row = next(it for it in rows if (it["width"], it["height"], it["frames"]) == (width, height, frames))
    assert row["stock_bytes"] > 10 * GIB
    assert row["resident_bytes"] <= resident_gib * GIB
    assert row["streamed_bytes"] <= streamed_gib * GIB
    assert row["decode_bytes"] <= decode_gib * GIB
    size = ("--width", str(width), "--height", str(height), "--frames", str(frames))
    code, answer = run_json(capsys, "plan", "--model", "svd", *size, "--vram", "2GiB")
    assert code == 0
    assert answer["plan"]["model"] == "svd"
    assert answer["plan"]["decode_chunk_size"] == frames


WAN = ("--model", "wan2.1-i2v-14b", "--width", "832", "--height", "480", "--frames", "81", "--vram", "7.25GiB")


@pytest.mark.parametrize(
    ("weights", "formats"), first_quick([("q4_k_m", ["Q4_K"]), ("Q8_0", ["Q8_0"]), ("fp8", ["F8_E4M3"])])
)
def test_quantised_weights_need_less_host_memory_and_are_named(
    capsys: Captured, weights: str, formats: list[str]
) -> None:
    code, answer = run_json(capsys, "plan", *WAN, "--ram", "48GiB", "--weights", weights)
    assert code == 0
    assert answer["plan"]["file_formats"] == formats
    assert any("weights: approximate" in reason for reason in answer["reasons"])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((*WAN, "--weights", "q4_z"), "'Q4_Z' is not a weight format"),
        ((*WAN, "--weights", "absent.gguf"), "there is no file absent.gguf"),
        ((*SMALL, "--vram", "8GiB", "--weights", "q4_k"), "I2VGen-XL takes no quantised weights"),
    ],
)
def test_weights_that_cannot_be_are_refused(capsys: Captured, arguments: tuple[str, ...], said: str) -> None:
    assert main(["plan", *arguments]) == 2
    assert said in capsys.readouterr().err
