"""A long search for a GGUF header that crashes the parser, or is accepted with bytes that are not its own."""

from __future__ import annotations

import os
import random
import time

import pytest

import gguf_cases as cases
from gpunvme.errors import FormatError
from gpunvme.models import gguf_header

pytestmark = [pytest.mark.slow, pytest.mark.timeout(0)]

SECONDS = float(os.environ.get("GPUNVME_FUZZ_SECONDS", "60"))


def test_no_header_is_more_than_an_error() -> None:
    """The seed is in the failure; ``GPUNVME_FUZZ_SECONDS`` says how long to search."""
    seed = int.from_bytes(os.urandom(8), "little")
    until = time.monotonic() + SECONDS
    accepted = refused = 0
    while time.monotonic() < until:
        seed += 1
        data = cases.spoiled(random.Random(seed))
        try:
            header = gguf_header.parse(data, len(data))
        except FormatError as error:
            assert error.offset is not None, f"seed {seed}"  # noqa: PT017 - most headers are refused, not all
            assert 0 <= error.offset <= len(data), f"seed {seed}"  # noqa: PT017
            refused += 1
            continue
        accepted += 1
        end = 0
        for tensor in header.described.values():
            assert tensor.nbytes == 0 or tensor.offset >= end, f"seed {seed}"
            end = max(end, tensor.offset + tensor.nbytes)
            assert end <= len(data), f"seed {seed}"
        for key in header.metadata:
            try:
                header.metadata[key]
            except FormatError:
                pass
    print(f"{accepted} accepted and {refused} refused")
    assert accepted
    assert refused
