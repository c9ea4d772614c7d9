"""NVTX ranges on the driver's queues: a timeline must show what the queues did, and when they were reset."""

from __future__ import annotations

import re

import numpy as np
import pytest

import fake_nvtx
import gpunvme
from gpunvme import nvme

RAM = "soft:ram?size=1MiB"


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> fake_nvtx.Notes:
    return fake_nvtx.use(monkeypatch)


def matched(seen: fake_nvtx.Notes, *patterns: str) -> None:
    """All ranges have ended, and these were there, each after the one before."""
    lasted = iter(seen.lasted())
    for pattern in patterns:
        assert any(re.fullmatch(pattern, each) for each in lasted), (pattern, seen.lasted())


def test_ranges_name_the_command_and_the_queues(seen: fake_nvtx.Notes) -> None:
    with nvme.open(RAM, queues=3) as controller:
        namespace = controller.namespace()
        namespace.write_from(np.ones(1 << 16, np.uint8))
        namespace.flush()
        namespace.gather([0, 5, 9])
    matched(
        seen, "3 queues made on soft:ram.*", "Write over 3 queues of soft:ram.*", "Flush over 3 .*", "Read over 3 .*"
    )


def test_a_lost_command_and_the_reset_have_ranges(seen: fake_nvtx.Notes) -> None:
    with nvme.open(f"{RAM}&faults=cq-stall%234", timeout=0.3, admin_timeout=2, queues=2) as controller:
        assert controller.namespace().read().nbytes == 1 << 20
        assert controller.resets > 0
    matched(
        seen, "2 queues made .*", "Read over 2 queues .*", r"\d+ commands aborted on soft:ram.*", "reset of soft:ram.*"
    )


def test_ranges_end_with_transfers_that_fail(seen: fake_nvtx.Notes) -> None:
    with nvme.open(f"{RAM}&faults=error:0x281!") as controller, pytest.raises(gpunvme.NvmeError):
        controller.namespace().read()
    matched(seen, "Read over .*")


def test_ranges_end_with_a_controller_that_never_gets_ready(seen: fake_nvtx.Notes) -> None:
    with pytest.raises(gpunvme.NvmeError):
        nvme.open(f"{RAM}&to=1&faults=short-ready:60000")
    matched(seen, "4 queues made .*")
