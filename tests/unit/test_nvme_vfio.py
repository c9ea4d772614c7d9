"""`VfioTransport` on a VFIO that the test plays: what real hardware shows only sometimes.

The guests in tests/qemu have the real VFIO; here are the layouts, limits and refusals that they do not have.
"""

from __future__ import annotations

import ctypes
import os
import resource
import struct
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from gpunvme.errors import TransportError, UriError
from gpunvme.nvme import pinned, vfio_group
from gpunvme.nvme import vfio_uapi as uapi
from gpunvme.nvme.pinned import physical_addresses
from gpunvme.nvme.sysfs import Machine
from gpunvme.nvme.vfio import VfioTransport
from gpunvme.nvme.vfio_group import LockedMemoryError
from nvme_machine import BDF, Tree

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

BAR_BYTES = 0x4000
CONFIG_AT = 0x10000
MASTER = 4


class Vfio:
    """What the ioctls of one machine's VFIO answer. Tests change its attributes."""

    def __init__(self, tree: Tree) -> None:
        self.tree = tree
        self.device_file = tree.path("/dev/the-device")
        self.device_file.write_bytes(bytes(CONFIG_AT + 4096))
        self.viable = True
        self.version = 0
        self.extensions = {uapi.TYPE1V2_IOMMU, uapi.NOIOMMU_IOMMU}
        self.ranges: list[tuple[int, int]] | None = [(0, 0xFEDFFFFF), (0xFEF00000, (1 << 39) - 1)]
        self.sparse: list[tuple[int, int]] | None = None
        self.mappable = True
        self.bar_bytes = BAR_BYTES
        self.can_reset = True
        self.errors: dict[int, OSError] = {}
        self.mapped: dict[int, tuple[int, int]] = {}
        self.calls: list[int] = []
        self.more_ranges_than_fit = False

    def __call__(self, fd: int, request: int, argument: Any = 0) -> int:
        self.calls.append(request)
        if request in self.errors:
            raise self.errors[request]
        answers = {
            uapi.GET_API_VERSION: lambda: self.version,
            uapi.CHECK_EXTENSION: lambda: int(argument in self.extensions),
            uapi.GROUP_GET_STATUS: lambda: _set(argument, flags=int(self.viable)),
            uapi.GROUP_GET_DEVICE_FD: lambda: os.open(self.device_file, os.O_RDWR),
            uapi.DEVICE_GET_INFO: lambda: _set(argument, flags=int(self.can_reset) | 2),
            uapi.DEVICE_GET_REGION_INFO: lambda: self.region(argument),
            uapi.IOMMU_GET_INFO: lambda: self.iommu_info(argument),
            uapi.IOMMU_MAP_DMA: lambda: self.map(argument.iova, argument.vaddr, argument.size),
            uapi.IOMMU_UNMAP_DMA: lambda: self.unmap(argument.iova, argument.size),
            uapi.IOAS_ALLOC: lambda: _set(argument, out_ioas_id=5),
            uapi.IOAS_IOVA_RANGES: lambda: self.iova_ranges(argument),
            uapi.IOAS_MAP: lambda: self.map(argument.iova, argument.user_va, argument.length),
            uapi.IOAS_UNMAP: lambda: self.unmap(argument.iova, argument.length),
        }
        return answers.get(request, lambda: 0)()

    def region(self, argument: Any) -> int:
        whole = isinstance(argument, bytearray)
        info = uapi.RegionInfo.from_buffer(argument) if whole else argument
        if info.index == uapi.CONFIG_REGION:
            return _set(info, size=4096, offset=CONFIG_AT, flags=3)
        _set(info, size=self.bar_bytes, offset=0, flags=3 | (uapi.REGION_FLAG_MMAP if self.mappable else 0))
        if self.sparse is not None:
            info.flags |= uapi.REGION_FLAG_CAPS
            capability = struct.pack("=HHIII", 1, 1, 0, len(self.sparse), 0)
            capability += b"".join(struct.pack("=QQ", *area) for area in self.sparse)
            # An unrelated capability comes first.
            self._append(info, argument, struct.pack("=HHI", 3, 1, 32 + 8) + capability)
        return 0

    def iommu_info(self, argument: bytearray) -> int:
        info = uapi.Type1Info.from_buffer(argument)
        if self.ranges is not None:
            info.flags |= uapi.IOMMU_INFO_CAPS
            capability = struct.pack("=HHIII", uapi.TYPE1_CAP_IOVA_RANGE, 1, 0, len(self.ranges), 0)
            self._append(info, argument, capability + b"".join(struct.pack("=QQ", *each) for each in self.ranges))
        return 0

    @staticmethod
    def _append(info: Any, argument: Any, tail: bytes) -> None:
        """As the kernel: capabilities where there is room for them, else how much room they need."""
        nbytes = ctypes.sizeof(info) + len(tail)
        if isinstance(argument, bytearray) and len(argument) >= nbytes:
            info.cap_offset = ctypes.sizeof(info)
            argument[ctypes.sizeof(info) : nbytes] = tail
        info.argsz = nbytes

    def iova_ranges(self, argument: Any) -> int:
        assert self.ranges is not None
        ranges = self.ranges * 100 if self.more_ranges_than_fit else self.ranges
        if argument.num_iovas < len(ranges):
            argument.num_iovas = len(ranges)
            raise OSError(90, "Message too long")
        array = (uapi.IovaRange * len(ranges)).from_address(argument.allowed_iovas)
        for place, (start, last) in zip(array, ranges, strict=True):
            place.start, place.last = start, last
        argument.num_iovas = len(ranges)
        return 0

    def map(self, iova: int, address: int, nbytes: int) -> int:
        assert iova % 4096 == address % 4096 == nbytes % 4096 == 0
        for start, (_, size) in self.mapped.items():
            assert iova + nbytes <= start or start + size <= iova, "mapped twice"
        self.mapped[iova] = (address, nbytes)
        return 0

    def unmap(self, iova: int, nbytes: int) -> int:
        assert self.mapped.pop(iova)[1] == nbytes
        return 0

    def command_register(self) -> int:
        return int.from_bytes(self.device_file.read_bytes()[CONFIG_AT + 4 : CONFIG_AT + 6], "little")


def _set(structure: Any, **fields: int) -> int:
    for name, value in fields.items():
        setattr(structure, name, value)
    return 0


@pytest.fixture
def vfio(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Vfio]:
    tree = Tree(tmp_path)
    tree.pci(driver="vfio-pci")
    tree.file("/dev/vfio/vfio", "")
    tree.file("/dev/vfio/12", "")
    played = Vfio(tree)
    monkeypatch.setattr(uapi, "call", played)
    before = set(os.listdir("/proc/self/fd"))
    yield played
    after = set(os.listdir("/proc/self/fd"))
    assert len(after) <= len(before), "descriptors are left open"


def transport(vfio: Vfio, **options: Any) -> VfioTransport:
    return VfioTransport(BDF, machine=Machine(vfio.tree.root), **options)


def iommufd(vfio: Vfio) -> None:
    vfio.tree.folder(f"/sys/bus/pci/devices/{BDF}/vfio-dev/vfio3")
    vfio.tree.file("/dev/vfio/devices/vfio3", bytes(CONFIG_AT + 4096))
    vfio.tree.file("/dev/iommu", "")


def test_registers_are_memory_of_this_process(vfio: Vfio) -> None:
    open_ = transport(vfio)
    open_.write_register(0x28, 8, 0x1122334455667788)
    open_.write_register(0x14, 4, 0xAABBCCDD)
    assert open_.read_register(0x28, 8) == 0x1122334455667788
    assert open_.read_register(0x2C, 4) == 0x11223344
    assert vfio.device_file.read_bytes()[0x14:0x18] == bytes.fromhex("ddccbbaa")
    assert open_.doorbells is not None
    ctypes.c_uint32.from_address(open_.doorbells + 8).value = 7
    assert vfio.device_file.read_bytes()[0x1008] == 7
    open_.close()


@pytest.mark.parametrize("offset", [-4, 2, BAR_BYTES, BAR_BYTES - 2])
def test_registers_outside_of_the_bar_are_refused(vfio: Vfio, offset: int) -> None:
    open_ = transport(vfio)
    with pytest.raises(ValueError, match="no register"):
        open_.read_register(offset, 4)
    with pytest.raises(ValueError, match="no register"):
        open_.write_register(offset, 4, 0)
    open_.close()


def test_msix_table_is_not_mapped_but_reached(vfio: Vfio) -> None:
    # Kernels before 4.16 leave the pages of the MSI-X table out; touching them would be a bus error.
    vfio.sparse = [(0, 0x2000), (0x3000, 0x1000)]
    open_ = transport(vfio)
    assert open_.doorbells is not None
    for offset in (0x1FFC, 0x2000, 0x2FFC, 0x3000):
        open_.write_register(offset, 4, offset)
        assert open_.read_register(offset, 4) == offset
    assert vfio.device_file.read_bytes()[0x2000:0x2002] == b"\x00\x20"
    assert open_._bar.address_of(0x2000) is None
    open_.close()


def test_bar_that_cannot_be_mapped_at_all(vfio: Vfio) -> None:
    vfio.mappable = False
    open_ = transport(vfio)
    assert open_.doorbells is None
    open_.write_register(0x1000, 4, 3)
    assert open_.read_register(0x1000, 4) == 3
    open_.close()


@pytest.mark.parametrize("nbytes", [0, 0x1000])
def test_bar_too_small_for_a_controller(vfio: Vfio, nbytes: int) -> None:
    vfio.bar_bytes = nbytes
    with pytest.raises(TransportError, match="BAR0"):
        transport(vfio)


def test_memory_is_mapped_at_iovas_of_the_iommu(vfio: Vfio) -> None:
    vfio.ranges = [(0, 0xFFFFF), (0x200000, 0x203FFF), (0x300000, 0x3FFFFFF)]
    open_ = transport(vfio)
    first, second = open_.allocate(0x3001), open_.allocate(100)
    assert (first.iova(), first.nbytes) == (0x200000, 0x3001)
    # What is left of the first range is too small; nothing below 1 MiB is used.
    assert second.iova() == 0x300000
    assert vfio.mapped == {0x200000: (first.address, 0x4000), 0x300000: (second.address, 4096)}
    assert bytes(first.view()) == bytes(0x3001)
    first.close()
    assert list(vfio.mapped) == [0x300000]
    second.close()
    open_.close()


def test_kernels_that_do_not_tell_get_the_usual_ranges(vfio: Vfio) -> None:
    vfio.ranges = None
    open_ = transport(vfio)
    memories = [open_.map(4096 * (1 + number), 4096) for number in range(3)]
    assert all(memory.iova() < 0xFEE00000 or memory.iova() >= 0xFEF00000 for memory in memories)
    open_.close()


def test_iovas_that_are_used_up_are_a_memory_error(vfio: Vfio) -> None:
    vfio.ranges = [(0x200000, 0x201FFF)]
    open_ = transport(vfio)
    kept = open_.allocate(8192)
    with pytest.raises(MemoryError, match="IOVA"):
        open_.allocate(1)
    kept.close()
    open_.allocate(1).close()
    open_.close()


def test_limit_of_locked_memory_is_explained(vfio: Vfio, monkeypatch: pytest.MonkeyPatch) -> None:
    open_ = transport(vfio)
    vfio.errors[uapi.IOMMU_MAP_DMA] = OSError(12, "Cannot allocate memory")
    monkeypatch.setattr(resource, "getrlimit", lambda _which: (8 << 20, 8 << 20))
    with pytest.raises(LockedMemoryError, match=r"limit: 8.0 MiB.*ulimit -l.*LimitMEMLOCK.*--ulimit memlock"):
        open_.allocate(16 << 20)
    vfio.errors[uapi.IOMMU_MAP_DMA] = OSError(28, "No space left on device")
    with pytest.raises(MemoryError, match="dma_entry_limit"):
        open_.allocate(4096)
    vfio.errors[uapi.IOMMU_MAP_DMA] = OSError(14, "Bad address")
    with pytest.raises(TransportError, match="Bad address") as caught:
        open_.map(4096, 4096)
    assert not isinstance(caught.value, MemoryError)
    # What could not be mapped has no IOVA.
    del vfio.errors[uapi.IOMMU_MAP_DMA]
    assert open_.allocate(1).iova() == 1 << 20
    open_.close()


def test_bus_mastering_is_on_while_open_and_off_after(vfio: Vfio) -> None:
    open_ = transport(vfio)
    assert vfio.command_register() & MASTER
    open_.close()
    assert not vfio.command_register() & MASTER


def test_close_comes_before_free_and_twice_is_once(vfio: Vfio) -> None:
    open_ = transport(vfio)
    memory = open_.allocate(4096)
    open_.close()
    open_.close()
    assert open_.doorbells is None
    vfio.calls.clear()
    memory.close()  # its mapping has ended with the device: nothing may be called for it
    assert vfio.calls == []
    with pytest.raises(TransportError, match="closed"):
        open_.read_register(0, 4)


def test_reset(vfio: Vfio) -> None:
    open_ = transport(vfio)
    open_.reset()
    assert vfio.calls[-1] == uapi.DEVICE_RESET
    vfio.errors[uapi.DEVICE_RESET] = OSError(16, "Device or resource busy")
    with pytest.raises(TransportError, match="IOMMU group"):
        open_.reset()
    open_.close()
    vfio.can_reset = False
    open_ = transport(vfio)
    with pytest.raises(TransportError, match="no function-level reset"):
        open_.reset()
    open_.close()


# --- what keeps it from being opened


@pytest.mark.parametrize(("driver", "words"), [("nvme", "the driver nvme"), (None, "no driver")])
def test_other_drivers_are_named(vfio: Vfio, driver: str | None, words: str) -> None:
    vfio.tree.path(f"/sys/bus/pci/devices/{BDF}/driver").unlink()
    vfio.tree.pci(driver=driver)
    with pytest.raises(TransportError, match=f"is with {words}.*gpunvme nvme bind {BDF}"):
        transport(vfio)


def test_variants_of_vfio_pci_will_do(vfio: Vfio) -> None:
    vfio.tree.path(f"/sys/bus/pci/devices/{BDF}/driver").unlink()
    vfio.tree.pci(driver="nvme_vfio_pci")
    transport(vfio).close()


def test_group_that_is_not_viable_names_the_others(vfio: Vfio) -> None:
    vfio.viable = False
    vfio.tree.pci("0000:01:00.1", code="0x010802", driver="nvme", group=12)
    vfio.tree.pci("0000:00:01.0", code="0x060400", driver="pcieport", group=12)
    vfio.tree.pci("0000:01:00.2", code="0x010802", driver="vfio-pci", group=12)
    with pytest.raises(TransportError, match=r"group 12 with 0000:01:00.1 \(NVMe\) with nvme: the IOMMU"):
        transport(vfio)


@pytest.mark.parametrize(
    ("number", "words"), [(13, "chown"), (16, "another process drives it"), (19, "gone"), (5, "Input/output error")]
)
def test_group_that_cannot_be_opened(vfio: Vfio, monkeypatch: pytest.MonkeyPatch, number: int, words: str) -> None:
    really = os.open

    def refused(path: Any, flags: int, *more: int) -> int:
        if str(path).endswith("/dev/vfio/12"):
            raise OSError(number, os.strerror(number))
        return really(path, flags, *more)

    monkeypatch.setattr(os, "open", refused)
    with pytest.raises(TransportError, match=f"/dev/vfio/12 cannot be opened: .*{words}"):
        transport(vfio)


def test_missing_device_files_say_what_to_load(vfio: Vfio) -> None:
    vfio.tree.path("/dev/vfio/vfio").unlink()
    with pytest.raises(TransportError, match=r"modprobe vfio-pci.*--device=/dev/vfio"):
        transport(vfio)


@pytest.mark.parametrize(("version", "extensions"), [(1, {uapi.TYPE1V2_IOMMU}), (0, set())])
def test_other_kinds_of_vfio(vfio: Vfio, version: int, extensions: set[int]) -> None:
    vfio.version, vfio.extensions = version, extensions
    with pytest.raises(TransportError, match="vfio_iommu_type1"):
        transport(vfio)


@pytest.mark.parametrize(
    "request_",
    [uapi.GROUP_SET_CONTAINER, uapi.SET_IOMMU, uapi.GROUP_GET_DEVICE_FD, uapi.DEVICE_GET_INFO, uapi.IOMMU_GET_INFO],
)
def test_whatever_fails_on_the_way_closes_everything(vfio: Vfio, request_: int) -> None:
    # The fixture counts descriptors.
    vfio.errors[request_] = OSError(1, "Operation not permitted")
    with pytest.raises((TransportError, OSError)):
        transport(vfio)


def test_unsafe_interrupts_are_explained(vfio: Vfio) -> None:
    vfio.errors[uapi.SET_IOMMU] = OSError(1, "Operation not permitted")
    with pytest.raises(TransportError, match="allow_unsafe_interrupts"):
        transport(vfio)


# --- iommufd


def test_iommufd_where_there_is_no_group(vfio: Vfio) -> None:
    iommufd(vfio)
    vfio.more_ranges_than_fit = True
    vfio.tree.path("/dev/vfio/12").unlink()
    open_ = transport(vfio)
    assert open_.way == "/dev/vfio/devices/vfio3"
    memory = open_.allocate(4096)
    assert memory.iova() == 1 << 20
    assert uapi.IOAS_MAP in vfio.calls
    memory.close()
    assert vfio.mapped == {}
    open_.close()


def test_group_comes_first_unless_iommufd_is_asked_for(vfio: Vfio) -> None:
    iommufd(vfio)
    for prefer, way in (("auto", "/dev/vfio/12"), ("group", "/dev/vfio/12"), ("iommufd", "/dev/vfio/devices/vfio3")):
        open_ = transport(vfio, prefer=prefer)
        assert open_.way == way
        open_.close()
    with pytest.raises(UriError, match="auto, group, iommufd"):
        transport(vfio, prefer="uio")


@pytest.mark.parametrize("request_", [uapi.DEVICE_BIND_IOMMUFD, uapi.DEVICE_ATTACH_IOMMUFD_PT, uapi.IOAS_ALLOC])
def test_iommufd_that_fails_closes_everything(vfio: Vfio, request_: int) -> None:
    iommufd(vfio)
    vfio.errors[request_] = OSError(22, "Invalid argument")
    with pytest.raises((TransportError, OSError)):
        transport(vfio, prefer="iommufd")


def test_kernels_without_iommufd_say_which_have_it(vfio: Vfio) -> None:
    with pytest.raises(TransportError, match=r"CONFIG_VFIO_DEVICE_CDEV.*6\.6"):
        transport(vfio, prefer="iommufd")


# --- without an IOMMU


def without_iommu(vfio: Vfio) -> None:
    vfio.tree.file("/sys/kernel/iommu_groups/12/name", "vfio-noiommu")
    vfio.tree.path("/dev/vfio/12").unlink()
    vfio.tree.file("/dev/vfio/noiommu-12", "")


def test_no_iommu_must_be_asked_for_by_name(vfio: Vfio) -> None:
    with pytest.raises(TransportError, match="leave noiommu=1 out"):
        transport(vfio, noiommu=True)
    without_iommu(vfio)
    with pytest.raises(TransportError, match="noiommu=1"):
        transport(vfio)
    open_ = transport(vfio, noiommu=True)
    assert open_.way == "/dev/vfio/noiommu-12"
    assert open_.maps_any_memory is False
    with pytest.raises(TransportError, match="memory of its own"):
        open_.map(4096, 4096)
    open_.close()


def pagemap(path: Path, address: int, frames: list[int]) -> str:
    with path.open("wb") as file:
        file.seek(address // 4096 * 8)
        file.write(np.array(frames, np.uint64).tobytes())
    return str(path)


def test_physical_addresses(tmp_path: Path) -> None:
    present = 1 << 63
    name = pagemap(tmp_path / "pagemap", 0x7000, [present | 0x1234, present | 1 << 62 | 0x77])
    assert physical_addresses(0x7000, 8192, name).tolist() == [0x1234000, 0x77000]


@pytest.mark.parametrize(
    ("frames", "words"),
    [
        # Without CAP_SYS_ADMIN the kernel says zero: a controller would write to the first page of memory.
        ([1 << 63, 1 << 63], "CAP_SYS_ADMIN"),
        ([1 << 63 | 5, 1 << 63], "CAP_SYS_ADMIN"),
        ([1 << 63 | 5, 1 << 62 | 5], "not there"),
        ([1 << 63 | 5], "not there"),
    ],
)
def test_hidden_physical_addresses_are_refused(tmp_path: Path, frames: list[int], words: str) -> None:
    name = pagemap(tmp_path / "pagemap", 0x7000, frames)
    with pytest.raises(TransportError, match=words):
        physical_addresses(0x7000, 8192, name)


def test_memory_that_cannot_be_pinned_is_not_given_out(vfio: Vfio, monkeypatch: pytest.MonkeyPatch) -> None:
    without_iommu(vfio)
    open_ = transport(vfio, noiommu=True)

    class Refusing:
        @staticmethod
        def syscall(*_arguments: Any) -> int:
            ctypes.set_errno(1)
            return -1

    monkeypatch.setattr(pinned, "_libc", Refusing)
    with pytest.raises(TransportError, match="io_uring_disabled=0"):
        open_.allocate(4096)
    open_.close()


# --- what the kernel's answers are made of


def test_sizes_of_structures() -> None:
    """As include/uapi/linux/vfio.h and iommufd.h have them on 64-bit machines."""
    sizes = {
        uapi.GroupStatus: 8,
        uapi.DeviceInfo: 20,
        uapi.RegionInfo: 32,
        uapi.Type1Info: 24,
        uapi.Type1Map: 32,
        uapi.Type1Unmap: 24,
        uapi.BindIommufd: 16,
        uapi.AttachIommufd: 12,
        uapi.IoasAlloc: 12,
        uapi.IoasIovaRanges: 32,
        uapi.IoasMap: 40,
        uapi.IoasUnmap: 24,
    }
    assert {kind: ctypes.sizeof(kind) for kind in sizes} == sizes
    assert (uapi.GET_API_VERSION, uapi.IOMMU_MAP_DMA, uapi.DEVICE_RESET) == (0x3B64, 0x3B71, 0x3B6F)
    assert (uapi.DEVICE_BIND_IOMMUFD, uapi.IOAS_ALLOC, uapi.IOAS_MAP) == (0x3B76, 0x3B81, 0x3B85)


@pytest.mark.parametrize("chain", [b"", b"\0" * 8, struct.pack("=HHI", 2, 1, 8), struct.pack("=HHI", 2, 1, 1 << 31)])
def test_chain_of_capabilities_that_goes_nowhere(chain: bytes) -> None:
    data = bytes(8) + chain
    assert uapi.capability(data, 8, 1) is None
    assert uapi.capability(data, 0, 1) is None
    assert uapi.capability(data, 1 << 20, 1) is None


def test_capability_behind_others() -> None:
    data = bytes(8) + struct.pack("=HHI", 7, 1, 24) + bytes(8) + struct.pack("=HHIIIQQ", 1, 1, 0, 1, 0, 5, 6)
    offset = uapi.capability(data, 8, 1)
    assert offset == 24
    assert uapi.ranges_of(data, offset) == [(5, 6)]


def test_mapping_errors_of_this_process_name_its_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _which: (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert "limit: none" in str(vfio_group.mapping_error(OSError(12, "x"), 4096))
