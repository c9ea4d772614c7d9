"""`gpunvme accept` as a person runs it: a kernel of its own, drives, an IOMMU; at length with the kernel module."""

from __future__ import annotations

import disks
import guest
import module
import pytest

pytestmark = pytest.mark.timeout(900)

PROGRAMS = ("accept", "accept_interrupted") if guest.LONG else ("accept",)


@pytest.fixture(scope="module")
def on_new(tmp_path_factory: pytest.TempPathFactory) -> guest.Checks:
    """The kernel that has P2PDMA."""
    folder = tmp_path_factory.mktemp("accept")
    environment = {}
    if guest.LONG:
        environment["GUEST_MODULE"] = str(module.build(guest.NEW, folder / "kmod")[0])
    return guest.run_checks(
        PROGRAMS,
        folder,
        devices=disks.to_be_accepted,
        kernel=guest.NEW,
        environment=environment,
        timeout=850,
    )


@pytest.mark.parametrize(("program", "name"), guest.checks_of(*PROGRAMS))
def test_in_the_guest(on_new: guest.Checks, program: str, name: str) -> None:
    on_new.expect(program, name)


def test_only_what_a_guest_lacks_is_left_out(on_new: guest.Checks) -> None:
    """There is no GPU, no directory was named, and in the short form the kernel module is not loaded."""
    steps = on_new.expect("accept", "everything_is_tried_and_the_drive_is_empty_again").facts
    for step, outcome in steps.items():
        lacking = (
            "GPU" in step or "files" in step or (not guest.LONG and ("kmod" in step or step == "take for gpunvme"))
        )
        assert outcome == ("skipped" if lacking else "passed"), step
