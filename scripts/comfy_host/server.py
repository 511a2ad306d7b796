"""Runs a headless ComfyUI with this pack for the duration of a `with` block, in temporary folders of its own."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType

from . import process
from .errors import StartError
from .setup import PACK, Host

PACK_FOLDER = "i2v_budget"
START_SECONDS = 180.0
POLL_SECONDS = 0.1
LOG_LINES = 30
ACCELERATOR = "import torch; print(getattr(torch, 'accelerator', torch.cuda).is_available())"


class Server:
    """The process of one host.

    All of its folders (input, output, models, custom nodes, user, temp) are temporary, so that it writes nothing to the
    host's folder and loads nothing of the user's from there except models. This pack is linked into its custom nodes.
    """

    def __init__(
        self,
        host: Host,
        *,
        with_pack: bool = True,
        arguments: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
        waiting: Callable[[], None] = lambda: None,
    ) -> None:
        """Prepare the host without starting it.

        Args:
            host: the host and the interpreter to run it in.
            with_pack: whether this pack is in its custom nodes.
            arguments: more arguments for the host's `main.py`.
            environment: environment variables for it, in addition to this process's own.
            waiting: called about ten times a second while it starts.
        """
        self._host = host
        self._with_pack = with_pack
        self._arguments = arguments
        self._environment = environment
        self._waiting = waiting
        self._folder = Path(tempfile.mkdtemp(prefix="i2v-budget-"))
        self._process: subprocess.Popen[str] | None = None
        self.port = _free_port()
        self.url = f"http://127.0.0.1:{self.port}"

    @property
    def input_folder(self) -> Path:
        return self._folder / "input"

    @property
    def output_folder(self) -> Path:
        return self._folder / "output"

    @property
    def user_folder(self) -> Path:
        """Folder of the user's data, such as this pack's queue."""
        return self._folder / "user"

    @property
    def models_folder(self) -> Path:
        """Folder of models in addition to the host's own; `diffusers/NAME` holds a model in diffusers format."""
        return self._folder / "models"

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def log(self) -> str:
        """Return everything that the host has printed."""
        path = self._folder / "comfyui.log"
        return path.read_text("utf-8", errors="replace") if path.is_file() else ""

    def log_tail(self) -> str:
        """Return the last lines of `log`."""
        return "\n".join(self.log().splitlines()[-LOG_LINES:])

    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def __enter__(self) -> Server:
        """Start, and wait until the host answers.

        Raises:
            StartError: it ended, or did not answer within `START_SECONDS`; the message has its last lines.
        """
        try:
            self._lay_out()
            self.start()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def start(self) -> None:
        """Start in the existing folders and wait until the host answers; also used to restart it after it has died.

        Raises:
            StartError: it ended, or did not answer within `START_SECONDS`; the message has its last lines.
        """
        assert not self.running()
        temporary = dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(self._folder / "scratch"))
        environment = {**temporary, **(self._environment or {})}
        with (self._folder / "comfyui.log").open("w", encoding="utf-8") as log, process.interrupts_later():
            self._process = process.start(
                self._command(), output=log, folder=self._host.folder, environment=environment
            )
        self._wait_until_ready(self._process)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if self._process is not None:
                process.stop(self._process)
        finally:
            _unlink_folder(self._folder / "custom_nodes" / PACK_FOLDER)
            shutil.rmtree(self._folder, ignore_errors=True)

    def _lay_out(self) -> None:
        for name in ("input", "output", "user", "scratch", "custom_nodes", "models/diffusers"):
            (self._folder / name).mkdir(parents=True)
        if self._with_pack:
            _link_folder(self._folder / "custom_nodes" / PACK_FOLDER, PACK)
        own_models = {"host": {"diffusers": str(self._host.folder / "models" / "diffusers")}}
        (self._folder / "models.yaml").write_text(json.dumps(own_models), "utf-8")  # JSON is YAML

    def _command(self) -> list[str | Path]:
        command: list[str | Path] = [self._host.python, self._host.folder / "main.py"]
        command += ["--listen", "127.0.0.1", "--port", str(self.port), "--disable-auto-launch", "--disable-api-nodes"]
        command += ["--base-directory", self._folder, "--database-url", "sqlite:///:memory:"]
        command += ["--extra-model-paths-config", self._folder / "models.yaml"]
        if process.ask(self._host.python, ACCELERATOR) != "True":
            command.append("--cpu")
        return [*command, *self._arguments]

    def _wait_until_ready(self, child: subprocess.Popen[str]) -> None:
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            if child.poll() is not None:
                raise StartError(f"ComfyUI ended with exit status {child.returncode}:\n{self.log_tail()}")
            if _answers(self.url):
                return
            self._waiting()
            time.sleep(POLL_SECONDS)
        raise StartError(f"ComfyUI did not answer within {START_SECONDS:.0f} s:\n{self.log_tail()}")


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/system_stats", timeout=5.0):
            return True
    except (urllib.error.URLError, OSError):
        return False


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _link_folder(link: Path, target: Path) -> None:
    """Create a symbolic link, or on Windows a junction, which needs no administrator rights."""
    if sys.platform == "win32":
        import _winapi  # the standard library makes junctions nowhere else

        _winapi.CreateJunction(str(target), str(link))
    else:
        link.symlink_to(target, target_is_directory=True)


def _unlink_folder(link: Path) -> None:
    """Remove the link itself, so that deleting the folder cannot follow it."""
    if not link.exists():
        return
    if sys.platform == "win32":
        link.rmdir()  # a junction counts as a folder, and this leaves what it points to
    else:
        link.unlink()
