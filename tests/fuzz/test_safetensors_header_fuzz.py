"""A long search for a header that the safetensors library and we judge differently."""

from __future__ import annotations

import os
import random
import time
from pathlib import Path

import pytest

import safetensors_cases as cases
from gpunvme.errors import FormatError
from gpunvme.models import header

pytestmark = [pytest.mark.slow, pytest.mark.timeout(0)]

SECONDS = float(os.environ.get("GPUNVME_FUZZ_SECONDS", "60"))


def test_no_header_is_judged_differently(tmp_path: Path) -> None:
    """Whoever loads a hostile file relies on us to refuse what the library refuses, with an error and not a crash.

    The seed is in the failure; ``GPUNVME_FUZZ_SECONDS`` says how long to search.
    """
    safetensors = pytest.importorskip("safetensors", minversion="0.8")
    seed = int.from_bytes(os.urandom(8), "little")
    until = time.monotonic() + SECONDS
    accepted = refused = 0
    while time.monotonic() < until:
        seed += 1
        data = cases.spoiled(random.Random(seed))
        try:
            expected = {
                name: (view["dtype"], view["shape"], view["data"]) for name, view in safetensors.deserialize(data)
            }
        except safetensors.SafetensorError:
            expected = None
        try:
            tensors = header.parse(data, len(data)).tensors
            found = {
                name: (info.dtype.name, list(info.shape), data[info.offset : info.offset + info.nbytes])
                for name, info in tensors.items()
            }
        except FormatError:
            found = None
        assert found == expected, f"seed {seed}: {data[:2000]!r}"
        accepted += found is not None
        refused += found is None
    print(f"{accepted} accepted and {refused} refused by both")
    assert accepted
    assert refused
