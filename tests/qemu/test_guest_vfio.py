"""The driver on QEMU's NVMe controllers, through the kernel's VFIO, in guests; what runs there is in `inside/`.

Here is where real registers, a real IOMMU and the kernel's own driver say whether the package is right.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import disks
import guest
import pytest

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.timeout(900)

GROUP = ("vfio_transport", "binding", "driver", "command_line")


@pytest.fixture(scope="module")
def by_group(tmp_path_factory: pytest.TempPathFactory) -> guest.Checks:
    """The kernel that has VFIO groups only; the QEMU that is installed."""
    folder = tmp_path_factory.mktemp("group")
    return guest.run_checks(GROUP, folder, devices=disks.behind_iommu, kernel=guest.DEBIAN, timeout=600)


@pytest.mark.parametrize(("program", "name"), guest.checks_of(*GROUP))
def test_by_group(by_group: guest.Checks, program: str, name: str) -> None:
    by_group.expect(program, name)


def test_a_fault_is_seen_in_the_log(by_group: guest.Checks) -> None:
    """QEMU answers a command that faults with success: without the log nobody would know."""
    result = by_group.expect("vfio_transport", "unmapped_memory_faults")
    assert "DMAR: [DMA Write" in result.dmesg
    assert "00:08.0" in result.dmesg


def test_nothing_faults_between_checks(by_group: guest.Checks) -> None:
    expected = by_group.expect("vfio_transport", "unmapped_memory_faults").dmesg.count("DMAR: [DMA")
    assert by_group.report.dmesg.count("DMAR: [DMA") == expected


# --- the library itself: a test of a guest that fails must fail


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return tmp_path / "share"


def test_guest_that_hangs_is_ended(place: Path) -> None:
    with pytest.raises(guest.GuestError, match="ended after 3 s"):
        guest.run(["sleep", "1000"], place, devices=[], timeout=3)


@pytest.mark.slow
def test_guest_whose_kernel_dies_says_so(place: Path) -> None:
    with pytest.raises(guest.GuestError, match="Kernel panic"):
        guest.run(["sh", "-c", "echo c >/proc/sysrq-trigger; sleep 60"], place, devices=[], timeout=60)


def test_failed_checks_fail(place: Path) -> None:
    result = guest.Result(False, "Traceback: it went wrong", "nvme nvme0: timeout", 1.0, {})
    report = guest.Report(0, "", "", "", place, 1.0)
    checks = guest.Checks(report, {("program", "check"): result})
    with pytest.raises(AssertionError, match="it went wrong"):
        checks.expect("program", "check")
    with pytest.raises(guest.GuestError, match="did not run"):
        checks.expect("program", "other")


def test_emulator_that_breaks_off_is_told_from_a_guest_that_dies(place: Path) -> None:
    """A reset ends QEMU as a fault of its own does: without a word on the console."""
    with pytest.raises(guest.EmulatorError, match="QEMU ended with 0"):
        guest.run(["sh", "-c", "echo begun; sync; echo b >/proc/sysrq-trigger; sleep 60"], place, devices=[])


def test_emulator_that_breaks_off_is_started_once_more(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    places: list[Path] = []

    def run(command: list[str], share: Path, **options: object) -> guest.Report:
        places.append(share)
        if len(places) == 1:
            raise guest.EmulatorError("it ended")
        share.mkdir()
        line = '{"program": "binding", "name": "a", "passed": true, "text": "", "dmesg": "", "seconds": 1, "facts": {}}'
        (share / "results").write_text(line)
        return guest.Report(0, "", "", "", share, 1.0)

    monkeypatch.setattr(guest, "run", run)
    checks = guest.run_checks(["binding"], tmp_path, devices=lambda folder: [str(folder)])
    assert checks.results["binding", "a"].passed
    assert places[0] != places[1], "the second guest would find what the first left"

    def breaks_off(*_: object, **__: object) -> guest.Report:
        raise guest.EmulatorError("it ended again")

    monkeypatch.setattr(guest, "run", breaks_off)
    with pytest.raises(guest.EmulatorError, match="again"):
        guest.run_checks(["binding"], tmp_path / "other", devices=lambda folder: [])
