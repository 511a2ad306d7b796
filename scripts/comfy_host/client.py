"""HTTP and websocket client of a running host: queues prompts, receives events and outputs.

HTTP is plain and synchronous. `Client.run` follows a prompt over the websocket; aiohttp, which the host itself
requires, does that part.
"""

from __future__ import annotations

import asyncio
import json
import struct
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from .errors import HostError

JSON = dict[str, Any]
"""A JSON object of the host, which documents no schema."""

TIMEOUT_SECONDS = 30.0
_DROP_EVERY_SECONDS = 0.1
TEXT_MESSAGE = 3
"""Type number of binary messages that hold text; the others are previews."""
ENDS = {"execution_success", "execution_error", "execution_interrupted"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """A message of the host about the prompt that is followed."""

    kind: str
    data: JSON


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """The result of one prompt: its events in order, and the outputs of its nodes, by node id."""

    prompt_id: str
    events: list[Event]
    outputs: dict[str, JSON] = field(default_factory=dict)

    @property
    def cached(self) -> set[str]:
        """The ids of the nodes that were not run again."""
        return {node for event in self.events if event.kind == "execution_cached" for node in event.data["nodes"]}

    @property
    def executed(self) -> list[str]:
        """The ids of the nodes that were run, in order."""
        return [event.data["node"] for event in self.events if event.kind == "executing" and event.data["node"]]


class PromptRefusedError(HostError):
    """The host found nodes of the prompt invalid, before it ran them."""

    def __init__(self, answer: JSON) -> None:
        self.error: JSON = answer.get("error", {})
        self.node_errors: dict[str, JSON] = answer.get("node_errors") or {}
        lines = [
            f"{node['class_type']}: {error['message']} ({error['details']})"
            for node in self.node_errors.values()
            for error in node["errors"]
        ]
        super().__init__("\n".join([self.error.get("message", "The prompt was refused."), *lines]))


class ExecutionError(HostError):
    """A node raised while it ran."""

    def __init__(self, data: JSON) -> None:
        self.node_id: str = data["node_id"]
        self.node_type: str = data["node_type"]
        self.exception_type: str = data["exception_type"]
        self.message: str = data["exception_message"].strip()
        super().__init__(f"{self.node_type}: {self.message}")


class InterruptedRunError(HostError):
    """The run was interrupted through the host."""


class Client:
    """One caller of the host at `url`."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._id = uuid.uuid4().hex

    def object_info(self) -> dict[str, JSON]:
        """Every node that the host has: inputs, outputs and their descriptions."""
        return self._get("/object_info")

    def system_stats(self) -> JSON:
        return self._get("/system_stats")

    def history(self, prompt_id: str) -> JSON:
        """Return the outputs and the status of a prompt that has ended."""
        return self._get(f"/history/{prompt_id}")[prompt_id]

    def interrupt(self) -> None:
        """Ask the host to stop what it is running."""
        self._request("/interrupt", {})

    def drop(self, prompt_id: str) -> None:
        """Remove a prompt from the queue, or stop it if it runs; return when it is gone.

        A single interrupt may not be enough: the host drops one that arrives before the prompt has started.

        Raises:
            HostError: the prompt is still there after `TIMEOUT_SECONDS`.
        """
        until = time.monotonic() + TIMEOUT_SECONDS
        while any(prompt_id in item for items in self._get("/queue").values() for item in items):
            if time.monotonic() > until:
                raise HostError(f"The prompt {prompt_id} could not be removed.")
            self._request("/queue", {"delete": [prompt_id]})
            self.interrupt()
            time.sleep(_DROP_EVERY_SECONDS)

    def queue(self, prompt: JSON, *, workflow: JSON | None = None) -> str:
        """Put an API-format prompt in the host's queue and return its id.

        Args:
            prompt: the prompt.
            workflow: the workflow it was made from, which the host saves with what it makes.

        Raises:
            PromptRefusedError: the host found it invalid, or a part of it, in which case it runs the rest.
        """
        extra = {"extra_pnginfo": {"workflow": workflow}} if workflow else {}
        answer = self._request("/prompt", {"prompt": prompt, "client_id": self._id, "extra_data": extra})
        if answer["node_errors"]:
            raise PromptRefusedError(answer)
        return answer["prompt_id"]

    def run(
        self,
        prompt: JSON,
        *,
        workflow: JSON | None = None,
        watch: Callable[[Event], None] = lambda _: None,
        timeout_seconds: float = 600.0,
    ) -> Run:
        """Run an API-format prompt to its end.

        Args:
            prompt: the prompt.
            workflow: as in `queue`.
            watch: called with each event of this prompt; also with previews (`preview`: `image`, the bytes of a file)
                and texts on a node (`progress_text`: `node`, `text`), which do not carry a prompt id.
            timeout_seconds: maximum duration of the run.

        Raises:
            PromptRefusedError: the host found it invalid.
            ExecutionError: a node raised.
            InterruptedRunError: it was interrupted.
            HostError: the connection was lost, or the run took too long.
        """
        try:
            run = asyncio.run(asyncio.wait_for(self._follow(prompt, workflow, watch), timeout_seconds))
        except asyncio.TimeoutError:
            raise HostError(f"The run took longer than {timeout_seconds:.0f} s.") from None
        except aiohttp.ClientError as error:
            raise HostError(f"The connection to {self.url} was lost: {error}") from error
        end = next(event for event in reversed(run.events) if event.kind in ENDS)
        if end.kind == "execution_error":
            raise ExecutionError(end.data)
        if end.kind == "execution_interrupted":
            raise InterruptedRunError("The run was interrupted.")
        return run

    async def _follow(self, prompt: JSON, workflow: JSON | None, watch: Callable[[Event], None]) -> Run:
        events: list[Event] = []
        address = f"{self.url}/ws?clientId={self._id}"
        async with aiohttp.ClientSession() as session, session.ws_connect(address, max_msg_size=0) as socket:
            prompt_id = await asyncio.to_thread(self.queue, prompt, workflow=workflow)
            async for message in socket:
                if message.type is aiohttp.WSMsgType.BINARY:
                    watch(_binary_event(message.data))
                if message.type is not aiohttp.WSMsgType.TEXT:
                    continue
                content = json.loads(message.data)
                data = content["data"]
                if data.get("prompt_id") != prompt_id:
                    continue  # another prompt's, or the host's own
                events.append(Event(kind=content["type"], data=data))
                watch(events[-1])
                # The host sends this last for a prompt, after its history is written.
                if content["type"] == "executing" and data["node"] is None:
                    return Run(prompt_id=prompt_id, events=events, outputs=self.history(prompt_id)["outputs"])
        raise HostError("ComfyUI closed the connection before the run had ended.")

    def _get(self, path: str) -> Any:
        return self._open(urllib.request.Request(self.url + path))

    def _request(self, path: str, body: JSON) -> Any:
        headers = {"Content-Type": "application/json"}
        return self._open(urllib.request.Request(self.url + path, json.dumps(body).encode("utf-8"), headers))

    def _open(self, request: urllib.request.Request) -> Any:
        try:
            with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS) as answer:
                content = answer.read()
        except urllib.error.HTTPError as error:
            content = error.read()
            if error.code != 400:
                raise HostError(f"{request.full_url}: HTTP {error.code}: {content[:500]!r}") from error
            raise PromptRefusedError(json.loads(content)) from error
        except OSError as error:
            raise HostError(f"{request.full_url} does not answer: {error}") from error
        return json.loads(content) if content else None


def _binary_event(message: bytes) -> Event:
    """Decode a preview or a text; the first number gives the type."""
    (kind,) = struct.unpack_from(">I", message)
    if kind == TEXT_MESSAGE:
        (length,) = struct.unpack_from(">I", message, 4)
        node, text = message[8 : 8 + length], message[8 + length :]
        return Event(kind="progress_text", data={"node": node.decode("utf-8"), "text": text.decode("utf-8")})
    return Event(kind="preview", data={"image": message[8:]})
