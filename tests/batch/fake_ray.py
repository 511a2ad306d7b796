"""An in-process stand-in for the calls of `ray` that the driver uses: actors run in threads, and can be killed."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

_RESTART_SECONDS = 0.3


class RayError(Exception):
    pass


class RayTaskError(RayError):
    """A method of an actor has raised."""

    def __init__(self, cause: Exception) -> None:
        super().__init__(f"ray::method()\n{cause!r}")
        self.cause = cause


class RayActorError(RayError):
    """An actor has ended before its method returned."""


class ActorUnavailableError(RayError):
    """An actor is being restarted."""


class GetTimeoutError(RayError):
    pass


class _Exceptions:
    RayError, RayTaskError, RayActorError = RayError, RayTaskError, RayActorError
    ActorUnavailableError, GetTimeoutError = ActorUnavailableError, GetTimeoutError


class _Ref:
    def __init__(self) -> None:
        self.done = threading.Event()
        self.value: Any = None
        self.error: RayError | None = None

    def settle(self, value: Any = None, error: RayError | None = None) -> None:
        self.value, self.error = value, error
        self.done.set()


class _Method:
    def __init__(self, actor: Actor, name: str) -> None:
        self._actor, self._name = actor, name

    def remote(self, *args: Any) -> _Ref:
        return self._actor.call(self._name, args)


class Actor:
    """An instance of the class, made anew when it is killed and may be restarted."""

    def __init__(self, make: Callable[[], Any], restarts: int) -> None:
        self._make, self._restarts = make, restarts
        self._lock = threading.Lock()
        self._pending: set[_Ref] = set()
        self._restarting = False
        self.instance: Any = make()

    def __getattr__(self, name: str) -> _Method:
        return _Method(self, name)

    def call(self, name: str, args: tuple[Any, ...]) -> _Ref:
        ref = _Ref()
        with self._lock:
            instance = self.instance
            if instance is None:
                gone = ActorUnavailableError if self._restarting else RayActorError
                ref.settle(error=gone("the actor is not there"))
                return ref
            self._pending.add(ref)

        def run() -> None:
            value, problem = None, None
            try:
                value = getattr(instance, name)(*args)
            except Exception as error:
                problem = RayTaskError(error)
            with self._lock:
                if ref in self._pending:  # else the actor was killed, and what it returns is lost
                    self._pending.discard(ref)
                    ref.settle(value, problem)

        threading.Thread(target=run, name=f"actor {name}", daemon=True).start()
        return ref

    def kill(self, *, restart: bool) -> None:
        with self._lock:
            old, pending = self.instance, self._pending
            self.instance, self._pending = None, set()
            self._restarting = restart and self._restarts > 0
        end(old)
        for ref in pending:
            ref.settle(error=RayActorError("the actor died unexpectedly"))
        if self._restarting:
            threading.Thread(target=self._restart, daemon=True).start()

    def _restart(self) -> None:
        time.sleep(_RESTART_SECONDS)
        self._restarts -= 1
        self.instance, self._restarting = self._make(), False


def end(worker: Any) -> None:
    """Stops what a worker runs, as the end of its process would."""
    if worker is not None:
        worker._engine.stop()
        worker._engine._over.wait(60)
        worker._store.close()


class _ActorClass:
    def __init__(self, ray: FakeRay, cls: type, options: dict[str, Any]) -> None:
        self._ray, self._cls, self._options = ray, cls, options

    def options(self, **options: Any) -> _ActorClass:
        return _ActorClass(self._ray, self._cls, options)

    def remote(self, *args: Any) -> Actor:
        actor = Actor(lambda: self._cls(*args), self._options.get("max_restarts", 0))
        self._ray.actors.append(actor)
        return actor


class FakeRay:
    """To be given in place of the module. `actors` are in the order in which they were started."""

    exceptions = _Exceptions

    def __init__(self) -> None:
        self.actors: list[Actor] = []
        self.is_up = False

    def init(self, **_: Any) -> None:
        self.is_up = True

    def shutdown(self) -> None:
        self.is_up = False
        for actor in self.actors:
            actor.kill(restart=False)

    def nodes(self) -> list[dict[str, Any]]:
        return [{"NodeID": "here", "Alive": True, "Resources": {"CPU": 2.0}}]

    def remote(self, cls: type) -> _ActorClass:
        return _ActorClass(self, cls, {})

    def wait(
        self, refs: Sequence[_Ref], *, num_returns: int = 1, timeout: float | None = None
    ) -> tuple[list[_Ref], list[_Ref]]:
        assert refs, "ray.wait() needs at least one reference"
        assert self.is_up, "Ray has been shut down"
        until = time.monotonic() + (600 if timeout is None else timeout)
        while sum(ref.done.is_set() for ref in refs) < num_returns and time.monotonic() < until:
            time.sleep(0.005)
        ready = [ref for ref in refs if ref.done.is_set()][:num_returns]
        return ready, [ref for ref in refs if ref not in ready]

    def get(self, ref: _Ref, *, timeout: float | None = None) -> Any:
        if not ref.done.wait(timeout):
            raise GetTimeoutError
        if ref.error is not None:
            raise ref.error
        return ref.value

    def kill(self, actor: Actor, *, no_restart: bool = True) -> None:
        actor.kill(restart=not no_restart)
