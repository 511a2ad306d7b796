"""Memory of a device, and the part of it that may be used."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceMemory:
    """A device's memory at one moment.

        total                                       free_bytes + others_bytes
        ├── others_bytes      other programs
        └── free_bytes        free, or held by us
            └── available_bytes   within the user's limit
                ├── reserve_bytes     stays unused
                └── usable_bytes      what all of our stages together may take

    Plans are made for `usable_bytes`, and stages of a batch admitted by it: neither adds nor subtracts anything of
    its own.
    """

    free_bytes: int
    """Not held by other programs. What we hold ourselves counts as free."""

    limit_bytes: int | None = None
    """The user's limit on what we take; None: all that is free."""

    reserve_bytes: int = 0
    """Kept unused, for others."""

    others_bytes: int = 0
    """Held by other programs; 0 where that is not known."""

    @property
    def available_bytes(self) -> int:
        return self.free_bytes if self.limit_bytes is None else min(self.limit_bytes, self.free_bytes)

    @property
    def usable_bytes(self) -> int:
        return max(0, self.available_bytes - self.reserve_bytes)
