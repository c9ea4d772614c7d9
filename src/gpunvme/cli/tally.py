"""Several transfers added up, for commands that need more than one."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from gpunvme.cli.output import size

if TYPE_CHECKING:
    from gpunvme.transfer import Transfer


@dataclass
class Tally:
    """What transfers in one direction did, in bytes, and which paths did it, in seconds of transfer time."""

    nbytes: int = 0
    seconds: float = 0.0
    direct_bytes: int = 0
    cached_bytes: int = 0
    buffered_bytes: int = 0
    bounced_bytes: int = 0
    paths: dict[str, str] = field(default_factory=dict)

    def add(self, transfer: Transfer) -> None:
        """Count a finished transfer."""
        self.nbytes += transfer.nbytes
        self.seconds += transfer.seconds
        self.direct_bytes += transfer.direct_bytes
        self.cached_bytes += transfer.cached_bytes
        self.buffered_bytes += transfer.buffered_bytes
        self.bounced_bytes += transfer.bounced_bytes
        self.paths[transfer.path] = transfer.reason

    def as_dict(self) -> dict[str, Any]:
        """Return the sums, for ``--json``."""
        return {**self.__dict__, "paths": dict(self.paths)}

    def __str__(self) -> str:
        parts = [
            f"{size(nbytes)} {way}"
            for nbytes, way in (
                (self.direct_bytes, "O_DIRECT"),
                (self.cached_bytes, "page cache"),
                (self.buffered_bytes, "buffered"),
            )
            if nbytes
        ]
        return f"{', '.join(parts) or 'nothing'} by {', '.join(self.paths) or 'no path'}"
