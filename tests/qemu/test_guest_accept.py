"""`gpunvme accept` as a person runs it: on a kernel of its own, with drives, an IOMMU, and the kernel module."""

from __future__ import annotations

import disks
import guest
import module
import pytest

pytestmark = pytest.mark.timeout(600)

# What a guest has nothing for; everything else has to pass there.
WITHOUT_GPU = "GPU"
WITHOUT_DIRECTORY = "files"


@pytest.fixture(scope="module")
def on_new(tmp_path_factory: pytest.TempPathFactory) -> guest.Checks:
    """The kernel that has P2PDMA."""
    folder = tmp_path_factory.mktemp("accept")
    built, _ = module.build(guest.NEW, folder / "kmod")
    return guest.run_checks(
        ["accept"],
        folder,
        devices=disks.to_be_accepted,
        kernel=guest.NEW,
        environment={"GUEST_MODULE": str(built)},
        timeout=500,
    )


@pytest.mark.parametrize(("program", "name"), guest.checks_of("accept"))
def test_in_the_guest(on_new: guest.Checks, program: str, name: str) -> None:
    on_new.expect(program, name)


def test_only_what_a_guest_lacks_is_left_out(on_new: guest.Checks) -> None:
    steps = on_new.expect("accept", "everything_is_tried_and_the_drive_is_empty_again").facts
    for step, outcome in steps.items():
        lacking = WITHOUT_GPU in step or WITHOUT_DIRECTORY in step
        assert outcome == ("skipped" if lacking else "passed"), step
