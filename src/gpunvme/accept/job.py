"""What a step is told: which drive, where on it, by which driver, and what the steps before it left."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

MIB = 1 << 20


@dataclass(frozen=True)
class Job:
    """An order for a child, as JSON on its way there.

    Attributes
    ----------
    address
        PCI address of the drive.
    nsid, nbytes, block_size
        Of the namespace that is written to.
    area, area_nbytes
        Where it is written: bytes from its beginning, multiples of 1 MiB.
    far
        Another MiB that is written, near the end.
    driver
        The kernel's driver that has the drive, or shall get it.
    uri
        The drive for a driver of our own; empty while the kernel's has it.
    device
        The GPU, such as ``cuda:0``.
    directory
        Where files may be made; empty for nowhere.
    left
        The seed of what the area holds (`contents`); None if that is not known.
    limits
        What steps before have seen: ``kernel read`` and ``link``, in GB/s.
    options
        The step's own.
    """

    address: str
    nsid: int = 1
    nbytes: int = 0
    block_size: int = 512
    area: int = 0
    area_nbytes: int = 0
    far: int = 0
    driver: str = "nvme"
    uri: str = ""
    device: str = "cuda:0"
    directory: str = ""
    left: int | None = None
    limits: dict[str, float] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)

    def encode(self) -> str:
        """Return it as a line of JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def decode(cls, text: str) -> Self:
        """Return what `encode` was given."""
        return cls(**json.loads(text))

    def with_(self, **changes: Any) -> Job:
        """Return it with some fields changed."""
        return replace(self, **changes)

    def limit(self, name: str, what: str) -> dict[str, Any]:
        """Return the arguments of a `Figure` for a limit, none if it was not seen."""
        return {"limit": self.limits[name], "limit_what": what} if self.limits.get(name) else {}


def contents(seed: int, nbytes: int) -> NDArray[np.uint8]:
    """Return bytes of which no two blocks are alike, others for each seed."""
    words = np.random.default_rng(seed).integers(0, 1 << 63, -(-nbytes // 8), np.uint64)
    return words.view(np.uint8)[:nbytes]


def compare(found: NDArray[np.uint8], wanted: NDArray[np.uint8], where: str) -> None:
    """Raise if bytes are not what they must be; says how many, and where the first is.

    Raises
    ------
    ValueError
        If they differ.
    """
    found = found.reshape(-1)
    if np.array_equal(found, wanted):
        return
    wrong = np.flatnonzero(found != wanted)
    raise ValueError(f"{where}: {len(wrong)} of {len(wanted)} bytes differ, the first at byte {int(wrong[0])}")
