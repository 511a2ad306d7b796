"""Videos are written and read back: the file holds everything, or does not exist."""

from __future__ import annotations

import gc
import subprocess
import sys
import textwrap
import tracemalloc
from pathlib import Path
from typing import Any

import imageio.v3 as iio
import numpy as np
import psutil
import pytest
import torch
from PIL import Image
from torch import Tensor

from i2v_core.errors import BadInputError, FileError
from i2v_core.video import FORMATS, VideoSettings, open_video
from tests.marking import first_quick

FILMS = [name for name, facts in FORMATS.items() if facts.encoding is not None]
METADATA = {"prompt": '{"1": {"class_type": "I2VLoader"}}', "workflow": '{"nodes": []}' + " " * 300_000}

every_format = pytest.mark.parametrize("name", FORMATS)
every_film = pytest.mark.parametrize("name", FILMS)


def save(path: Path, frames_FHWC: Tensor, name: str, **settings: Any) -> Path:
    """Write frames in chunks of three; return the file."""
    path = path / f"video{FORMATS[name].suffix}"
    with open_video(path, VideoSettings(format=name, **{"fps": 8.0, **settings}), METADATA) as sink:
        for chunk_FHWC in frames_FHWC.split(3):
            sink.write(chunk_FHWC)
    return path


def load(path: Path) -> np.ndarray[Any, Any]:
    """Read a video file or a folder of pictures: (F, H, W, 3)."""
    if path.is_dir():
        return np.stack([iio.imread(file) for file in sorted(path.iterdir())])
    return iio.imread(path, plugin="pyav")


@every_format
def test_frames_come_back_in_number_size_order_and_colour(name: str, tmp_path: Path, make_frames: Any) -> None:
    frames_FHWC = make_frames(10)
    loaded_FHWC = load(save(tmp_path, frames_FHWC, name, quality=4))
    assert loaded_FHWC.shape == frames_FHWC.shape
    # Colour subsampling smears edges, hence a mean.
    differences = np.abs(loaded_FHWC.astype(float) / 255 - frames_FHWC.numpy()).mean(axis=(1, 2, 3))
    assert differences.max() < {"png": 0.003, "gif": 0.03}.get(name, 0.012)


@every_film
def test_a_film_plays_at_its_rate(name: str, tmp_path: Path, make_frames: Any) -> None:
    for fps in (8.0, 12.5, 24.0):
        meta = iio.immeta(save(tmp_path, make_frames(9), name, fps=fps), plugin="pyav")
        assert meta["fps"] == pytest.approx(fps, rel=0.02)


def test_mp4_is_h264_in_yuv420p_with_colour_tags(tmp_path: Path, make_frames: Any) -> None:
    for quality in (0, 51):
        path = save(tmp_path, make_frames(), "mp4", quality=quality)
        meta = iio.immeta(path, plugin="pyav")
        assert (meta["codec"], meta["video_format"], meta["profile"]) == ("h264", "yuv420p", "High")
        content = path.read_bytes()
        assert content.index(b"moov") < content.index(b"mdat"), "the index is not at the start"
        assert b"nclx\x00\x01\x00\x01\x00\x01" in content, "the colours are not tagged as BT.709"


def test_webm_is_vp9(tmp_path: Path, make_frames: Any) -> None:
    meta = iio.immeta(save(tmp_path, make_frames(), "webm"), plugin="pyav")
    assert (meta["codec"], meta["video_format"]) == ("vp9", "yuv420p")


@pytest.mark.parametrize("name", ["mp4", "webm"])
def test_a_higher_quality_number_is_a_smaller_file(name: str, tmp_path: Path, make_frames: Any) -> None:
    torch.manual_seed(0)
    frames_FHWC = (make_frames() + 0.1 * torch.randn(8, 64, 96, 3)).clamp(0, 1)
    small, middle, large = (save(tmp_path, frames_FHWC, name, quality=q).stat().st_size for q in (51, 19, 0))
    assert small < len(METADATA["workflow"]) + 20_000 < middle + 20_000 < large + 20_000


@pytest.mark.parametrize("name", ["mp4", "webm"])
def test_metadata_is_in_the_film(name: str, tmp_path: Path, make_frames: Any) -> None:
    meta = iio.immeta(save(tmp_path, make_frames(), name), plugin="pyav")
    stored = {key.lower(): value for key, value in meta.items()}
    assert {key: stored[key] for key in METADATA} == METADATA


def test_metadata_is_in_the_first_picture_alone(tmp_path: Path, make_frames: Any) -> None:
    first, *others = sorted(save(tmp_path, make_frames(), "png").iterdir())
    assert first.name == "00001.png"
    with Image.open(first) as picture:
        assert picture.info == METADATA
    assert [file for file in others if Image.open(file).info] == []


@every_format
def test_odd_sizes_are_padded_only_where_the_codec_needs_it(name: str, tmp_path: Path, make_frames: Any) -> None:
    frames_FHWC = make_frames(4, 63, 95)
    path = tmp_path / f"odd{FORMATS[name].suffix}"
    with open_video(path, VideoSettings(format=name, fps=8.0, quality=4)) as sink:
        sink.write(frames_FHWC)
    loaded_FHWC = load(path)
    expected = (96, 64) if name == "mp4" else (95, 63)
    assert sink.size_pixels == (95, 63)
    assert sink.stored_size_pixels == expected == loaded_FHWC.shape[2:0:-1]
    assert np.abs(loaded_FHWC[:, :63, :95] / 255 - frames_FHWC.numpy()).mean() < 0.03


def test_uint8_alpha_and_values_out_of_range_are_accepted(tmp_path: Path) -> None:
    target = tmp_path / "pictures"
    with open_video(target, VideoSettings(format="png", fps=8.0)) as sink:
        sink.write(torch.full((1, 8, 8, 3), 200, dtype=torch.uint8))
        sink.write(torch.full((8, 8, 4), 0.5))
        sink.write(torch.tensor([-1.0, 2.0, 1 / 3], dtype=torch.float16).expand(1, 8, 8, 3))
    assert load(target)[:, 0, 0].tolist() == [[200, 200, 200], [128, 128, 128], [0, 255, 85]]


BAD_FRAMES = {
    "NaN": (torch.full((1, 8, 8, 3), float("nan")), "NaN"),
    "infinite": (torch.full((1, 8, 8, 3), float("inf")), "NaN or infinite"),
    "another size": (torch.zeros(1, 16, 8, 3), "8×16"),
    "two channels": (torch.zeros(1, 8, 8, 2), "(1, 8, 8, 2)"),
    "no pixels": (torch.zeros(1, 0, 8, 3), "(1, 0, 8, 3)"),
    "integers": (torch.zeros(1, 8, 8, 3, dtype=torch.int64), "int64"),
}


@pytest.mark.parametrize("case", BAD_FRAMES)
@pytest.mark.parametrize("name", ["mp4", "png"])
def test_bad_frames_are_refused_and_leave_nothing(case: str, name: str, tmp_path: Path) -> None:
    bad_FHWC, said = BAD_FRAMES[case]

    def write() -> None:
        with open_video(tmp_path / "video", VideoSettings(format=name, fps=8.0)) as sink:
            sink.write(torch.zeros(20, 8, 8, 3))
            sink.write(bad_FHWC)

    with pytest.raises(BadInputError) as error:
        write()
    assert said in error.value.problem
    assert list(tmp_path.iterdir()) == []


@every_format
def test_no_frames_are_an_error_and_leave_nothing(name: str, tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match="no frames"), open_video(tmp_path / "v", VideoSettings(format=name, fps=8)):
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", first_quick(FORMATS))
def test_an_unfinished_file_does_not_have_its_name_and_a_cancelled_one_leaves_nothing(
    name: str, tmp_path: Path, make_frames: Any
) -> None:
    path = tmp_path / f"video{FORMATS[name].suffix}"

    def write_and_cancel() -> None:
        with open_video(path, VideoSettings(format=name, fps=8.0)) as sink:
            sink.write(make_frames(60, 32, 32))
            assert not path.exists()
            assert len(list(tmp_path.iterdir())) == 1
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_and_cancel()
    gc.collect()
    assert list(tmp_path.iterdir()) == []


def test_an_existing_video_stays_until_the_new_one_is_whole(tmp_path: Path, make_frames: Any) -> None:
    path = save(tmp_path, make_frames(8), "mp4")
    before = path.read_bytes()
    with pytest.raises(BadInputError):
        save(tmp_path, torch.cat([make_frames(3), torch.full((1, 64, 96, 3), torch.nan)]), "mp4")
    assert path.read_bytes() == before
    assert len(load(save(tmp_path, make_frames(3), "mp4"))) == 3


def test_a_bad_path_is_reported_before_the_first_frame(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path, said in (
        (tmp_path / "file" / "video.mp4", "something else has that name"),
        (tmp_path / ("x" * 300) / "video.mp4", "too long"),
    ):
        with pytest.raises(FileError) as error, open_video(path, VideoSettings(format="mp4", fps=8.0)):
            raise AssertionError("it went on")
        assert said in error.value.problem
        assert str(path) in error.value.problem


def test_a_folder_in_the_way_is_kept(tmp_path: Path, make_frames: Any) -> None:
    target = tmp_path / "video"
    target.mkdir()
    (target / "mine").touch()
    for name in ("png", "mp4"):
        with pytest.raises(FileError, match="that name"), open_video(target, VideoSettings(format=name, fps=8)) as sink:
            sink.write(make_frames(2))
    assert [file.name for file in tmp_path.rglob("*")] == ["video", "mine"]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"format": "avi", "fps": 8.0}, "'avi'"),
        ({"format": "mp4", "fps": 0.0}, "0 frames"),
        ({"format": "mp4", "fps": float("nan")}, "nan frames"),
        ({"format": "mp4", "fps": 121.0}, "121 frames"),
        ({"format": "gif", "fps": 60.0}, "60 frames"),
        ({"format": "mp4", "fps": 8.0, "quality": 52}, "52"),
        ({"format": "mp4", "fps": 8.0, "quality": -1}, "-1"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(BadInputError) as error:
        VideoSettings(**settings)
    assert said in error.value.problem
    assert "use" in error.value.remedy or "choose" in error.value.remedy


@pytest.mark.slow
@every_format
def test_memory_does_not_grow_with_the_video(name: str, tmp_path: Path) -> None:
    """Measure Python's allocations and the whole process, encoder included, once the encoder's buffers are full."""
    frame_HWC = torch.rand(96, 128, 3)
    frame_bytes = frame_HWC.numel()  # as 8-bit pixels
    process = psutil.Process()
    first, last = (20, 220) if name == "gif" else (150, 1150)
    python_bytes = process_bytes = 0
    tracemalloc.start()
    try:
        with open_video(tmp_path / "long", VideoSettings(format=name, fps=30.0, quality=45)) as sink:
            for index in range(last):
                sink.write(frame_HWC.roll(index, dims=1))
                if index == first:
                    tracemalloc.reset_peak()
                    python_bytes, _ = tracemalloc.get_traced_memory()
                    process_bytes = process.memory_info().rss
            grown_bytes = process.memory_info().rss - process_bytes
            _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    kept_bytes = (last - first) * frame_bytes  # what a writer that keeps its frames would hold
    assert peak_bytes - python_bytes < kept_bytes / 10
    assert grown_bytes < kept_bytes / 2


@pytest.mark.skipif(sys.platform == "win32", reason="has no limit on the size of files")
@pytest.mark.slow
@pytest.mark.parametrize("name", FORMATS)
def test_a_full_disk_is_reported_and_leaves_nothing(name: str, tmp_path: Path) -> None:
    """Make a real write fail: the kernel lets the process make no file larger than 64 KiB."""
    script = f"""
        import resource, sys, torch
        from pathlib import Path
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))
        from i2v_core.errors import FileError
        from i2v_core.video import VideoSettings, open_video
        try:
            settings = VideoSettings(format={name!r}, fps=8.0, quality=1)
            with open_video(Path({str(tmp_path / "video")!r}), settings) as sink:
                for _ in range(40):
                    sink.write(torch.rand(256, 256, 3))
        except FileError as error:
            print(error)
    """
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert "cannot be written: the file grew larger than the system allows. Remedy: " in run.stdout
    assert "Exception ignored" not in run.stderr
    assert list(tmp_path.iterdir()) == []
