"""On a second kernel, which Debian does not have; see `tools/guest-setup`: VFIO by iommufd and without an IOMMU.

Where that kernel's headers are here, the kernel module, too: with KASAN, lockdep and whatever else it was built with.
"""

from __future__ import annotations

import disks
import guest
import module
import pytest

pytestmark = pytest.mark.timeout(900)

# The driver does not know how its transport was opened: at length it is run here, too.
IOMMUFD = ("vfio_transport", "driver") if guest.LONG else ("vfio_transport",)
NOIOMMU = ("vfio_noiommu", "driver") if guest.LONG else ("vfio_noiommu",)


@pytest.fixture(scope="module")
def by_iommufd(tmp_path_factory: pytest.TempPathFactory) -> guest.Checks:
    """A kernel with iommufd, and a newer QEMU."""
    folder = tmp_path_factory.mktemp("iommufd")
    return guest.run_checks(
        IOMMUFD,
        folder,
        devices=disks.behind_iommu,
        kernel=guest.SECOND,
        qemu=guest.newer_qemu(),
        environment={"GUEST_WAY": "iommufd"},
        timeout=600,
    )


@pytest.fixture(scope="module")
def without_iommu(tmp_path_factory: pytest.TempPathFactory) -> guest.Checks:
    folder = tmp_path_factory.mktemp("noiommu")
    return guest.run_checks(
        NOIOMMU,
        folder,
        devices=disks.devices,
        kernel=guest.SECOND,
        options="intel_iommu=off",
        qemu=guest.newer_qemu(),
        environment={"GUEST_WAY": "noiommu"},
        timeout=600,
    )


@pytest.mark.parametrize(("program", "name"), guest.checks_of(*IOMMUFD))
def test_by_iommufd(by_iommufd: guest.Checks, program: str, name: str) -> None:
    by_iommufd.expect(program, name)


@pytest.mark.parametrize(("program", "name"), guest.checks_of(*NOIOMMU))
def test_without_iommu(without_iommu: guest.Checks, program: str, name: str) -> None:
    without_iommu.expect(program, name)


def test_nothing_faults_between_checks(by_iommufd: guest.Checks) -> None:
    expected = by_iommufd.expect("vfio_transport", "unmapped_memory_faults").dmesg.count("DMAR: [DMA")
    assert by_iommufd.report.dmesg.count("DMAR: [DMA") == expected


@pytest.fixture(scope="module")
def with_module(tmp_path_factory: pytest.TempPathFactory) -> guest.Checks:
    if not module.tree_of(guest.SECOND).exists():
        pytest.skip("the second kernel's headers are not here")
    return module.checks_on(guest.SECOND, tmp_path_factory.mktemp("module"), loads=100 if guest.LONG else 10)


@pytest.mark.parametrize(("program", "name"), guest.checks_of(*module.PROGRAMS))
def test_kernel_module(with_module: guest.Checks, program: str, name: str) -> None:
    with_module.expect(program, name)
