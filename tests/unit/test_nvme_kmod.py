"""The kernel module's interface as Python knows it, and what a person is told who cannot open a device of it."""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from gpunvme import nvme
from gpunvme.errors import TransportError
from gpunvme.gpu import driver
from gpunvme.nvme import kmod
from gpunvme.nvme import kmod_uapi as uapi
from gpunvme.nvme.dma import DmaMemory
from gpunvme.nvme.gpu_memory import GPU_PAGE, GpuTransport
from gpunvme.nvme.sysfs import Machine
from gpunvme.nvme.vfio_group import LockedMemoryError
from nvme_machine import Tree

HEADER = Path(__file__).resolve().parents[2] / "kmod" / "gpunvme_uapi.h"
STRUCTURES = {"info": uapi.Info, "map": uapi.Map, "unmap": uapi.Unmap, "vector": uapi.Vector}
NUMBERS = {
    "GPUNVME_INFO": uapi.GET_INFO,
    "GPUNVME_MAP": uapi.MAP,
    "GPUNVME_UNMAP": uapi.UNMAP,
    "GPUNVME_VECTOR": uapi.SET_VECTOR,
    "GPUNVME_RESET": uapi.RESET,
    "GPUNVME_UAPI_VERSION": uapi.VERSION,
    "GPUNVME_UNIT": uapi.UNIT,
    "GPUNVME_MAP_WRITE": uapi.MAP_WRITE,
    "GPUNVME_INFO_IOMMU": uapi.INFO_IOMMU,
    "GPUNVME_INFO_DMABUF": uapi.INFO_DMABUF,
}


@pytest.mark.skipif(not shutil.which("cc"), reason="there is no C compiler")
def test_python_and_c_agree(tmp_path):
    """A field that lies elsewhere would have the kernel map other memory than was asked for."""
    expected: dict[str, int] = {**NUMBERS}
    expressions = list(NUMBERS)
    for name, structure in STRUCTURES.items():
        for field in structure._fields_:
            expression = f"offsetof(struct gpunvme_{name}, {field[0]})"
            expressions.append(expression)
            expected[expression] = getattr(structure, field[0]).offset
        expressions.append(f"sizeof(struct gpunvme_{name})")
        expected[expressions[-1]] = ctypes.sizeof(structure)
    lines = "".join(f'printf("%llu\\n", (unsigned long long)({each}));\n' for each in expressions)
    source = tmp_path / "layout.c"
    source.write_text(
        f'#include <stddef.h>\n#include <stdio.h>\n#include "{HEADER}"\nint main(void) {{\n{lines}return 0;\n}}\n'
    )
    subprocess.run(["cc", "-o", tmp_path / "layout", source], check=True, timeout=60)
    said = subprocess.run([tmp_path / "layout"], check=True, capture_output=True, text=True, timeout=10).stdout
    assert dict(zip(expressions, map(int, said.split()), strict=True)) == expected


def test_who_has_no_module_is_told_how_to_get_it(tmp_path):
    with pytest.raises(TransportError, match=r"it is not there: .*bind BDF --driver gpunvme \(docs/install\.md\)"):
        nvme.open(f"kmod:{tmp_path}/gpunvme0")


def test_each_refusal_to_open_says_what_to_do(tmp_path):
    """EPERM alone tells nobody that the IOMMU is off."""
    tree = Tree(tmp_path)
    machine = Machine(tmp_path)
    tree.folder("/dev")
    tree.path("/dev/gpunvme0").symlink_to("/dev/null")
    tree.process(5, "trainer", "/dev/null")

    def why(number: int) -> str:
        return kmod._why_not_opened(OSError(number, os.strerror(number)), "/dev/gpunvme0", machine)

    assert why(errno.ENOENT).startswith("it is not there: the headers of unknown are missing: sudo apt install")
    tree.file("/sys/module/gpunvme/version", "1")
    assert "the module holds no drive. Then, as root: gpunvme nvme bind BDF" in why(errno.ENOENT)
    tree.file("/sys/class/gpunvme/gpunvme3/dev", "240:3")
    assert "the module holds /dev/gpunvme3" in why(errno.ENOENT)
    assert why(errno.EBUSY) == "another process drives it: end process 5 (trainer) first"
    assert "contrib/60-gpunvme.rules and the group nvme" in why(errno.EACCES)
    assert "intel_iommu=on, and no iommu=pt" in why(errno.EPERM)
    assert "gpunvme nvme list" in why(errno.ENODEV)
    assert why(errno.EIO) == "Input/output error"


def test_module_of_another_version_says_which_to_install(monkeypatch):
    """An ioctl with another layout would map other memory than was meant."""

    def answer(fd: int, request: int, info: uapi.Info) -> None:
        info.version = 7

    monkeypatch.setattr(uapi, "call", answer)
    with pytest.raises(TransportError, match=r"version 7, this package knows 1: install .* sudo rmmod gpunvme"):
        kmod._info(0, "kmod:/dev/gpunvme0")


def test_another_device_is_not_taken_for_one():
    with pytest.raises(TransportError, match="no device of gpunvme's kernel module"):
        nvme.open("kmod:/dev/null")


class _Module(kmod.KmodTransport):
    """A device of the module whose dma-bufs end here."""

    def __init__(self, flags: int) -> None:
        self.gpu_access = kmod._gpu_access(uapi.Info.new(flags=flags))
        self.asked: list[tuple[int, ...]] = []
        self.closed = 0

    def map_dmabuf(self, fd, offset, nbytes, address=0, writable=True):
        os.fstat(fd)
        self.asked.append((fd, offset, nbytes, address, writable))
        iovas = np.arange(nbytes // 4096, dtype=np.uint64) * 4096 + (7 << 32)

        def release():
            self.closed += 1

        return DmaMemory(address, nbytes, iovas, release)


def test_gpu_memory_is_mapped_by_a_dma_buf_of_it(monkeypatch):
    """What a drive would be told to write to is what the GPU exported, and its descriptor is not kept."""
    made = []

    class Exporter:
        def __init__(self, device):
            self.device = device

        def export(self, address, nbytes):
            made.append((self.device, address, nbytes, os.open("/dev/null", os.O_RDONLY)))
            return made[-1][3]

        def close(self):
            pass

    monkeypatch.setattr(driver, "Gpu", Exporter)
    transport = _Module(uapi.INFO_DMABUF)
    assert transport.gpu_access.kind == "direct"
    assert isinstance(transport, GpuTransport)
    memory = transport.map_gpu(3 * GPU_PAGE, 2 * GPU_PAGE, 1)
    device, address, nbytes, fd = made[0]
    assert (device, address, nbytes) == (1, 3 * GPU_PAGE, 2 * GPU_PAGE)
    assert transport.asked == [(fd, 0, nbytes, address, True)]
    with pytest.raises(OSError, match="Bad file"):
        os.fstat(fd)
    assert (memory.address, memory.device, memory.iova(4096)) == (address, 1, (7 << 32) + 4096)
    memory.close()
    memory.close()
    assert transport.closed == 1
    with pytest.raises(ValueError, match="whole pages"):
        transport.map_gpu(4096, GPU_PAGE, 0)


def test_a_module_without_dma_bufs_maps_no_gpu_memory():
    assert _Module(uapi.INFO_IOMMU).gpu_access.kind == "none"


@pytest.mark.parametrize("fd", [-1, 5])
def test_too_many_mappings_are_told_from_too_much_memory(fd):
    error = kmod._why_not_mapped(OSError(errno.ENOSPC, "No space left on device"), fd, 4096)
    assert isinstance(error, LockedMemoryError)
    assert "gpunvme/parameters/max_mappings" in str(error)
    assert "max_mappings" not in str(kmod._why_not_mapped(OSError(errno.ENOMEM, "Cannot allocate"), -1, 4096))
