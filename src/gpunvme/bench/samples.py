"""Whether what arrived is what the file holds, by samples: a fast reader of wrong bytes has no speed."""

from __future__ import annotations

import os
import random
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from gpunvme.bench.contest import WrongBytes

_SAMPLES = 64
_BYTES = 4096


def compare_read(path: str, nbytes: int, fetch: Callable[[int, int], bytes]) -> None:
    """Compare samples of a destination that a file's start was read into.

    Parameters
    ----------
    path : str
        The file.
    nbytes : int
        How much was read.
    fetch : callable
        Returns bytes of the destination, given offset and length.
    """
    chosen = random.Random(1)
    places = [0, max(0, nbytes - _BYTES)] + [chosen.randrange(nbytes) for _ in range(_SAMPLES)]
    _compare(path, [(at, at, min(_BYTES, nbytes - at)) for at in places], fetch)


def compare_gathered(path: str, offsets: NDArray[np.int64], block: int, fetch: Callable[[int, int], bytes]) -> None:
    """Compare samples of a destination that blocks were gathered into.

    Parameters
    ----------
    path : str
        The file.
    offsets : array of int64
        Where the blocks come from, in the order in which they lie in the destination.
    block : int
        Bytes a block.
    fetch : callable
        Returns bytes of the destination, given offset and length.
    """
    chosen = random.Random(1)
    places = [0, len(offsets) - 1] + [chosen.randrange(len(offsets)) for _ in range(_SAMPLES)]
    _compare(path, [(int(offsets[index]), index * block, min(block, _BYTES)) for index in places], fetch)


def _compare(path: str, places: list[tuple[int, int, int]], fetch: Callable[[int, int], bytes]) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        for in_file, in_memory, nbytes in places:
            if os.pread(fd, nbytes, in_file) != fetch(in_memory, nbytes):
                raise WrongBytes(f"what arrived at {in_memory} is not what {path} holds at {in_file}")
    finally:
        os.close(fd)
