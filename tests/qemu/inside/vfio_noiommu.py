"""In a guest without an IOMMU: VFIO's unsafe mode, which must be asked for by name at every step."""

from __future__ import annotations

import os

import numpy as np
from checking import as_nobody, check, modprobe, namespace_path, refusal
from client import Client

from gpunvme.errors import TransportError
from gpunvme.nvme import bind as binding
from gpunvme.nvme import sysfs
from gpunvme.nvme.pinned import physical_addresses
from gpunvme.nvme.vfio import VfioTransport

BDF = "0000:00:08.0"


@check()
def bind_refuses_without_the_word() -> None:
    modprobe("nvme")
    disk = namespace_path(BDF)
    assert sysfs.find_function(BDF).iommu_group is None
    said = refusal(TransportError, binding.bind, BDF)
    assert "intel_iommu=on" in said, said
    assert "noiommu" in said, said
    assert os.path.exists(disk), "the controller was taken all the same"


@check()
def bind_with_the_word() -> dict[str, object]:
    change = binding.bind(BDF, noiommu=True)
    assert (change.before, change.after) == ("nvme", "vfio-pci")
    nodes = binding.user_nodes(BDF, sysfs.Machine())
    assert any("noiommu-" in node for node in nodes), nodes
    return {"nodes": nodes}


@check()
def open_refuses_without_the_word() -> None:
    said = refusal(TransportError, VfioTransport, BDF)
    assert "noiommu=1" in said, said


@check()
def identify_arrives() -> None:
    transport = VfioTransport(BDF, noiommu=True)
    client = Client(transport)
    memory = transport.allocate(64 * 4096)
    # One address a page, and no two the same; they are what the kernel says of these pages, and stay so.
    assert isinstance(memory.iovas, np.ndarray)
    assert len(set(memory.iovas.tolist())) == 64
    for page in (0, 1, 63):
        data = client.identify(memory, page * 4096)
        assert data[4:9] == b"first", data[:64]
    with open("/proc/sys/vm/compact_memory", "w") as compact:
        compact.write("1")
    assert np.array_equal(physical_addresses(memory.address, memory.nbytes), memory.iovas)
    assert transport.maps_any_memory is False
    assert "memory of its own" in refusal(TransportError, transport.map, memory.address, 4096)
    client.close()
    memory.close()


@check()
def iommufd_is_no_way() -> None:
    said = refusal(TransportError, VfioTransport, BDF, noiommu=True, prefer="iommufd")
    assert "via=group" in said, said


@check()
def ordinary_user_is_refused() -> None:
    for node in [*binding.user_nodes(BDF, sysfs.Machine()), "/dev/vfio/vfio"]:
        os.chmod(node, 0o666)
    said = as_nobody(lambda: refusal(TransportError, VfioTransport, BDF, noiommu=True))
    assert "root" in said, said


@check()
def physical_addresses_are_refused_without_privilege() -> None:
    """Zeroes for addresses would let the controller write to the first page of memory."""

    def ask() -> str:
        page = np.zeros(8192, np.uint8)
        page[:] = 1
        start = -(-page.ctypes.data // 4096) * 4096
        return refusal(TransportError, physical_addresses, start, 4096)

    said = as_nobody(ask)
    assert "physical addresses" in said, said


@check()
def kernel_gets_it_back() -> None:
    change = binding.unbind(BDF)
    assert (change.before, change.after) == ("vfio-pci", "nvme")
    namespace_path(BDF)
    assert sysfs.find_function(BDF).iommu_group is None
