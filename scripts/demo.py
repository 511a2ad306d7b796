"""An image and a prompt in, a video out, through a real ComfyUI, from nothing but Python 3.10 or newer.

Makes `.venv`, installs what is needed, gets a ComfyUI (or uses the one at COMFYUI_PATH), starts it without a window,
runs the bundled workflow in it and ends with the video's path and what each stage was predicted to need and needed.

Exit status: 0 a video was made, 1 it was not, 2 the arguments are wrong, 130 interrupted.
"""

import argparse
import sys
from pathlib import Path

from comfy_host import setup


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Makes a video from an image and a prompt in a real ComfyUI, which it sets up on the way.",
        epilog="COMFYUI_PATH: the folder of your own ComfyUI, to use instead of the one this gets. "
        "COMFYUI_PYTHON: the Python that it runs in, to use instead of this project's .venv.",
    )
    parser.add_argument("--image", type=_picture, help="the picture to start from (default: the bundled one)")
    parser.add_argument("--prompt", help="what is to happen (default: the bundled workflow's)")
    parser.add_argument("--seed", type=_seed, help="a number; the same one gives the same video")
    parser.add_argument("--vram", help="memory budget such as 2GiB or 900MiB (default: auto, what is free)")
    parser.add_argument("--out", type=Path, default=setup.PACK / "output", help="the video's folder (default: output)")
    parser.add_argument("--serve", action="store_true", help="leave ComfyUI open at the end, until Ctrl-C")
    return parser


def _picture(value: str) -> Path:
    path = Path(value).expanduser().resolve()
    if not path.is_file():
        raise argparse.ArgumentTypeError(f"there is no file {path}")
    return path


def _seed(value: str) -> int:
    if not value.isascii() or not value.isdigit() or int(value) >= 1 << 64:
        raise argparse.ArgumentTypeError(f"a seed is a whole number from 0 to 2^64 - 1, and {value!r} is not")
    return int(value)


def main() -> int:
    options = arguments().parse_args()
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # pyright: ignore[reportAttributeAccessIssue]

    def play(host: setup.Host) -> int:
        from comfy_host import demo  # it needs what was installed just now

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
