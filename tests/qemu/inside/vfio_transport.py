"""In a guest with an IOMMU: VFIO itself, with the smallest of clients.

0000:00:08.0, serial number "first", has three namespaces. GUEST_WAY is how it is opened: group or iommufd.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import resource
import struct

from checking import FAULT, KernelLog, as_nobody, check, in_child, modprobe, namespace_path, refusal
from client import Client

from gpunvme.errors import TransportError, UnsafeDeviceError
from gpunvme.nvme import bind as binding
from gpunvme.nvme import sysfs
from gpunvme.nvme.vfio import VfioTransport
from gpunvme.nvme.vfio_group import LockedMemoryError

BDF = "0000:00:08.0"
WAY = os.environ.get("GUEST_WAY", "group")


@contextlib.contextmanager
def opened():
    transport = VfioTransport(BDF, prefer=WAY)
    try:
        yield transport
    finally:
        transport.close()


@check()
def kernel_has_it_first() -> None:
    modprobe("nvme")
    for nsid in (1, 2, 3):
        namespace_path(BDF, nsid)
    (only,) = [each for each in sysfs.list_controllers() if each.function.address == BDF]
    assert only.serial == "first", only
    assert only.function.driver == "nvme"
    assert only.function.iommu_group is not None
    assert [(each.nsid, each.nbytes, each.block_size) for each in only.namespaces] == [
        (1, 64 << 20, 512),
        (2, 32 << 20, 4096),
        (3, 16 << 20, 512),
    ]
    assert only.function.bars[0] >= 0x2000
    assert f"/dev/{only.namespaces[0].name}" == namespace_path(BDF)


@check()
def unbound_function_names_the_command() -> None:
    assert f"gpunvme nvme bind {BDF}" in refusal(TransportError, VfioTransport, BDF)
    assert "no NVMe controller" in refusal(TransportError, VfioTransport, "0000:00:00.0")
    assert BDF in refusal(TransportError, VfioTransport, "0000:7f:1f.7")


@check()
def bind_hands_it_over() -> dict[str, object]:
    disk = namespace_path(BDF)
    change = binding.bind(BDF)
    assert (change.before, change.after) == ("nvme", "vfio-pci")
    assert os.path.basename(disk) in change.namespaces
    assert len(change.namespaces) == 3
    assert not os.path.exists(disk)
    assert binding.bind(BDF).changed is False
    return {"nodes": binding.user_nodes(BDF, sysfs.Machine())}


@check()
def identify_arrives() -> dict[str, object]:
    with opened() as transport:
        client = Client(transport)
        memory = transport.allocate(3 * 4096)
        data = client.identify(memory, 4096)
        assert data[4:24].decode().strip() == "first", data[:64]
        # Only the page that was meant.
        assert not any(memory.view(0, 4096))
        assert not any(memory.view(8192, 4096))
        client.close()
        return {"model": data[24:64].decode().strip(), "way": transport.way, "cap": hex(client.cap)}


@check()
def memory_of_the_callers_is_mapped() -> None:
    with opened() as transport:
        client = Client(transport)
        own = mmap.mmap(-1, 4 * 4096, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        address = ctypes.addressof(ctypes.c_char.from_buffer(own))
        with transport.map(address, len(own)) as mapped:
            data = client.identify(mapped, 2 * 4096)
            assert data == own[2 * 4096 : 3 * 4096]
            assert data[4:9] == b"first"
        client.close()


@check()
def read_only_memory_must_be_called_so() -> None:
    """A mapping that the controller cannot write to must never be taken for one that it can."""
    with opened() as transport:
        own = mmap.mmap(-1, 4096, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        own[:4] = b"text"
        address = ctypes.addressof(ctypes.c_char.from_buffer(own))
        assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(address), 4096, mmap.PROT_READ) == 0
        assert "cannot be mapped" in refusal(TransportError, transport.map, address, 4096)
        transport.map(address, 4096, writable=False).close()


@check()
def iovas_are_told_and_used_up_in_order() -> dict[str, object]:
    with opened() as transport:
        ranges = transport._device.iova_ranges
        # The window of message-signalled interrupts is no memory.
        assert not any(start < 0xFEF00000 and end > 0xFEE00000 for start, end in ranges), ranges
        memories = [transport.allocate(4096) for _ in range(64)]
        assert len({memory.iova() for memory in memories}) == 64
        assert min(memory.iova() for memory in memories) >= 1 << 20
        for memory in memories:
            memory.close()
        assert transport.allocate(4096).iova() == memories[0].iova(), "IOVAs do not come back"
        return {"ranges": [[hex(start), hex(end)] for start, end in ranges]}


@check(faults=True)
def unmapped_memory_faults() -> None:
    """The proof that the other checks would see a stray access."""
    with opened() as transport:
        client = Client(transport)
        memory = transport.allocate(4096)
        memory.view()[:4] = b"keep"
        iova = memory.iova()
        memory.close()
        client.command(6, prp1=iova, cdw10=1)
        client.close()


@check()
def reset_forgets_everything() -> None:
    with opened() as transport:
        Client(transport)
        assert transport.read_register(0x1C, 4) & 1 == 1
        transport.reset()
        assert transport.read_register(0x1C, 4) & 1 == 0, "CSTS.RDY survived a reset"
        client = Client(transport)
        assert client.identify(transport.allocate(4096))[4:9] == b"first"
        client.close()


@check()
def bus_mastering_ends_with_close() -> None:
    def command_register() -> int:
        with open(f"/sys/bus/pci/devices/{BDF}/config", "rb") as config:
            return struct.unpack_from("<H", config.read(64), 4)[0]

    with opened():
        assert command_register() & 4
    assert not command_register() & 4


@check()
def second_opener_is_told_who_has_it() -> None:
    with opened():
        said = in_child(lambda: refusal(TransportError, VfioTransport, BDF, prefer=WAY))
        assert "another process drives it" in said, said
        if WAY == "group":
            assert f"process {os.getpid()} (" in said, said
        # And nobody pulls it away from under us: the kernel would wait for us.
        said = refusal(UnsafeDeviceError, binding.unbind, BDF)
        assert f"process {os.getpid()}" in said, said


@check()
def open_again_at_once() -> None:
    for _ in range(5):
        with opened() as transport:
            client = Client(transport)
            assert client.identify(transport.allocate(4096))[4:9] == b"first"
            client.close()
    assert not binding.find_users(binding.user_nodes(BDF, sysfs.Machine()), sysfs.Machine())


@check()
def closed_transport_says_so() -> None:
    with opened() as transport:
        memory = transport.allocate(4096)
    transport.close()
    memory.close()
    assert "closed" in refusal(TransportError, transport.read_register, 0, 4)
    assert "closed" in refusal(TransportError, transport.allocate, 4096)


def limited(function):
    """What it says with at most 1 MiB of locked memory."""

    def run() -> str:
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (1 << 20, 1 << 20))
        return function()

    return run


@check()
def ordinary_user_is_told_what_to_do() -> None:
    """Permissions and limits are what users meet first."""
    said = as_nobody(lambda: refusal(TransportError, VfioTransport, BDF, prefer=WAY))
    assert "no permission" in said, said
    assert "chown" in said, said
    for node in [*binding.user_nodes(BDF, sysfs.Machine()), "/dev/vfio/vfio", "/dev/iommu"]:
        if os.path.exists(node):
            os.chmod(node, 0o666)

    def allocate() -> str:
        transport = VfioTransport(BDF, prefer=WAY)
        transport.allocate(64 << 10).close()
        return refusal(LockedMemoryError, transport.allocate, 64 << 20)

    said = as_nobody(limited(allocate))
    assert "ulimit -l" in said, said
    assert "1.0 MiB" in said, said


@check()
def kernel_gets_it_back() -> None:
    change = binding.unbind(BDF)
    assert (change.before, change.after) == ("vfio-pci", "nvme")
    disk = namespace_path(BDF)
    assert sysfs.find_function(BDF).driver == "nvme"
    with open(f"/sys/bus/pci/devices/{BDF}/driver_override") as override:
        assert override.read().strip() == "(null)"
    with open(disk, "rb", buffering=0) as file:
        assert file.read(4096) == bytes(4096)


@check()
def kernel_log_is_watched() -> None:
    log = KernelLog()
    with open("/dev/kmsg", "w") as kmsg:
        kmsg.write("<6>gpunvme: DMAX: [DMA is no fault\n")
    assert not FAULT.search(log.wait(FAULT, 0.1))
