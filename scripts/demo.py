"""Makes a video from an image and a prompt in a real ComfyUI. Needs nothing but Python 3.10 or newer.

Creates `.venv`, installs the requirements, gets a ComfyUI (or uses the one at COMFYUI_PATH), starts it headless, runs
the bundled workflow, and prints predicted and measured memory of each stage and the video's path.

Exit status: 0 a video was made, 1 it was not, 2 wrong arguments, 130 interrupted.
"""

import argparse
import sys
from pathlib import Path

from comfy_host import setup


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Makes a video from an image and a prompt in a real ComfyUI, which it sets up first.",
        epilog="COMFYUI_PATH: folder of your own ComfyUI, instead of a download. "
        "COMFYUI_PYTHON: the Python that it runs in, instead of this project's .venv.",
    )
    parser.add_argument("--image", type=_image, help="the first frame (default: the bundled image)")
    parser.add_argument("--prompt", help="what happens in the video (default: the bundled workflow's prompt)")
    parser.add_argument("--seed", type=_seed, help="a whole number; the same seed gives the same video")
    parser.add_argument("--vram", help="device memory budget such as 2GiB or 900MiB (default: auto, all that is free)")
    parser.add_argument(
        "--out", type=Path, default=setup.PACK / "output", help="folder for the video (default: output)"
    )
    parser.add_argument("--serve", action="store_true", help="keep ComfyUI running at the end, until Ctrl-C")
    return parser


def _image(value: str) -> Path:
    path = Path(value).expanduser().resolve()
    if not path.is_file():
        raise argparse.ArgumentTypeError(f"{path} does not exist")
    return path


def _seed(value: str) -> int:
    if not value.isascii() or not value.isdigit() or int(value) >= 1 << 64:
        raise argparse.ArgumentTypeError(f"{value!r} is not a valid seed: use a whole number from 0 to 2^64 - 1")
    return int(value)


def main() -> int:
    options = arguments().parse_args()
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # pyright: ignore[reportAttributeAccessIssue]

    def play(host: setup.Host) -> int:
        from comfy_host import demo  # needs the packages that setup has installed

        demo.play(
            host,
            image=options.image,
            prompt=options.prompt,
            seed=options.seed,
            budget=options.vram,
            out=options.out.expanduser().resolve(),
            serve=options.serve,
        )
        return 0

    return setup.run(play)


if __name__ == "__main__":
    sys.exit(main())
