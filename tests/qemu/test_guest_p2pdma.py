"""P2PDMA of the kernel's: one controller's files straight into another one's memory, in a guest."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import disks
import guest
import pytest

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.timeout(600)

CHECKS = guest.checks_of("p2pdma")
MIB = 1 << 20


def traced(folder: Path) -> list[str]:
    """The controllers, and QEMU's word on each address that one of them was told to move data to or from."""
    return [*disks.behind_switch(folder), "-trace", "enable=pci_nvme_map_addr", "-D", str(folder / "addresses")]


@pytest.fixture(scope="module")
def on_new(tmp_path_factory: pytest.TempPathFactory) -> guest.Checks:
    return guest.run_checks(
        ["p2pdma"], tmp_path_factory.mktemp("new"), devices=traced, kernel=guest.NEW, options="", timeout=300
    )


@pytest.mark.parametrize(("program", "name"), CHECKS)
def test_in_the_guest(on_new: guest.Checks, program: str, name: str) -> None:
    on_new.expect(program, name)


def test_the_controllers_were_given_the_peers_addresses(on_new: guest.Checks) -> None:
    """The kernel's counters are one thing; this is what arrived in the commands."""
    first, last = on_new.expect("p2pdma", "memory_is_mapped_and_given_back").facts["bar"]
    moved = on_new.expect("p2pdma", "a_file_goes_into_it_and_out_of_it").facts["moved"]
    log = (on_new.report.share.parent / "addresses").read_text()
    found = ((int(address, 16), int(nbytes)) for address, nbytes in re.findall(r"addr 0x([0-9a-f]+) len (\d+)", log))
    assert sum(nbytes for address, nbytes in found if first <= address <= last) >= moved


def test_a_kernel_without_it(tmp_path: Path) -> None:
    checks = guest.run_checks(["p2pdma_absent"], tmp_path, devices=disks.behind_switch, options="", timeout=120)
    for program, name in guest.checks_of("p2pdma_absent"):
        checks.expect(program, name)
