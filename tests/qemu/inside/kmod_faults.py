"""In a guest, after `kmod`: calls of the module's that the kernel fails, one after another (modules/failing_calls.c).

Each ends in an error that the caller sees, or costs nothing; and nothing is left of it.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from checking import check, shell
from client import Client
from exporter import Exporter
from kmod_device import BDF, NODE, contents, load, opened, page_of, stats

from gpunvme import nvme
from gpunvme.nvme import kmod_uapi as uapi

PARAMETERS = Path("/sys/module/failing_calls/parameters")
PAGES = 64  # of memory: more than one of everything
NO_MEMORY = -errno.ENOMEM
# By the number of the call; kernels name what kmalloc() calls by other names.
ALLOCATE = ("__kmalloc_cache_noprof", "kmalloc_trace", "__kmalloc_noprof", "__kmalloc")
ALLOCATE_MANY = ("__kvmalloc_node_noprof", "kvmalloc_node")
# What fails, with what, and what the caller sees: an error, or 0 where it does without.
MAP = (
    (ALLOCATE, 0, errno.ENOMEM),
    (ALLOCATE_MANY, 0, errno.ENOMEM),
    (("account_locked_vm",), NO_MEMORY, errno.ENOMEM),
    (("pin_user_pages_fast",), -errno.EOPNOTSUPP, errno.EOPNOTSUPP),
    (("pin_user_pages_fast",), 0, errno.EFAULT),
    (("sg_alloc_table_from_pages_segment",), NO_MEMORY, errno.ENOMEM),
    (("dma_map_sgtable",), -errno.EIO, errno.EIO),
    (("__xa_alloc",), NO_MEMORY, errno.ENOMEM),
)
MAP_DMABUF = (
    (("dma_buf_get",), -errno.EMFILE, errno.EMFILE),
    (ALLOCATE, 0, errno.ENOMEM),
    (("dma_buf_dynamic_attach",), NO_MEMORY, errno.ENOMEM),
    (("dma_buf_pin",), NO_MEMORY, errno.ENOMEM),
    (("dma_buf_map_attachment",), -errno.EIO, errno.EIO),
    (ALLOCATE_MANY, 0, errno.ENOMEM),
    (("__xa_alloc",), NO_MEMORY, errno.ENOMEM),
)
VECTOR = (
    (("eventfd_ctx_fdget",), -errno.EMFILE, errno.EMFILE),
    (("request_threaded_irq",), -errno.EBUSY, errno.EBUSY),
)
OPEN = (
    (ALLOCATE, 0, errno.ENOMEM),
    (("pci_alloc_irq_vectors_affinity", "pci_alloc_irq_vectors"), -errno.ENOSPC, 0),
    (("pci_try_reset_function",), -errno.ENOTTY, 0),
)
BIND = (
    (ALLOCATE, 0, errno.ENOMEM),
    (("ida_alloc_range",), -errno.ENOSPC, errno.ENOSPC),
    (("dev_set_name",), NO_MEMORY, errno.ENOMEM),
    (("pci_enable_device_mem",), -errno.EIO, errno.EIO),
    (("pci_request_selected_regions",), -errno.EBUSY, errno.EBUSY),
    (("dma_set_mask",), -errno.EIO, errno.EIO),
    (("pci_ioremap_bar",), 0, errno.ENOMEM),
    (("cdev_device_add",), NO_MEMORY, errno.ENOMEM),
)
Case = tuple[tuple[str, ...], int, int]


def parameter(name: str, value: object) -> None:
    (PARAMETERS / name).write_text(f"{value}\n")


def failed() -> int:
    return int((PARAMETERS / "failed").read_text())


@contextlib.contextmanager
def failing_calls() -> Iterator[None]:
    load(module="failing_calls")
    # Where kprobes do not stand on ftrace: as a jump, a probe could not go elsewhere (kprobes.rst).
    optimised = Path("/proc/sys/debug/kprobes-optimization")
    if optimised.exists():
        optimised.write_text("0")
    for line in Path("/proc/modules").read_text().splitlines():
        name, nbytes, *_, start = line.split()[:6]
        if name == "gpunvme":
            parameter("from", int(start, 16))
            parameter("to", int(start, 16) + int(nbytes))
    try:
        yield
    finally:
        shell("rmmod failing_calls")


@contextlib.contextmanager
def failing(names: tuple[str, ...], result: int, skip: int = 0) -> Iterator[None]:
    """Have the first of these functions that this kernel has fail, when the module calls it."""
    parameter("result", result)
    parameter("skip", skip)
    parameter("failed", 0)
    for name in names:
        try:
            parameter("function", name)
        except OSError:
            if name == names[-1]:
                raise
        else:
            break
    try:
        yield
    finally:
        parameter("function", "")


def outcome(call: Callable[[], object]) -> int:
    try:
        call()
    except OSError as error:
        return error.errno or -1
    return 0


def locked() -> str:
    """What counts against RLIMIT_MEMLOCK of this process."""
    return next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmLck"))


def fails_as_told(cases: tuple[Case, ...], call: Callable[[], object]) -> dict[str, object]:
    """Make a call fail in every place; return by what."""
    met = {}
    for names, result, expected in cases:
        before = locked()
        with failing(names, result):
            found = outcome(call)
            hits = failed()
        assert hits, f"{names}: the module does not call it"
        assert found == expected, f"{names} -> {result}: {errno.errorcode.get(found, found)}"
        assert locked() == before, names
        met[names[0]] = hits
    return met


def map_of(fd: int, memory: int, dmabuf: int = -1) -> uapi.Map:
    room = np.zeros(PAGES, np.uint64)
    start = memory if dmabuf < 0 else 0
    request = uapi.Map.new(
        flags=uapi.MAP_WRITE, address=start, nbytes=PAGES * 4096, addresses=room.ctypes.data, fd=dmabuf
    )
    uapi.call(fd, uapi.MAP, request)
    return request


@check()
def the_kernel_checks_what_it_allocates() -> dict[str, object]:
    """Not a test of the module: what the others rely on, where a kernel has no KASAN. See `CHECKED` in module.py."""
    cache = Path("/sys/kernel/slab/kmalloc-64")
    has = {name: (cache / name).read_text().strip() for name in ("sanity_checks", "red_zone", "poison")}
    assert set(has.values()) == {"1"}, has
    return has


@check()
def mapping_memory_fails_and_leaves_nothing() -> dict[str, object]:
    with failing_calls(), opened() as transport:
        memory, address = page_of(PAGES * 4096)
        memory[:] = bytes(len(memory))
        before = stats()
        met = fails_as_told(MAP, lambda: map_of(transport._fd, address))
        # The room for the addresses is allocated by the second such call.
        with failing(ALLOCATE_MANY, 0, skip=1):
            assert outcome(lambda: map_of(transport._fd, address)) == errno.ENOMEM
            assert failed() == 1
        now = stats()
        assert (now["pinned_bytes"], now["mapped"]) == (before["pinned_bytes"], before["mapped"]), now
        assert now["refused"] == before["refused"] + len(MAP) + 1
        map_of(transport._fd, address)
    assert stats()["pinned_bytes"] == 0
    return {"met": met}


@check()
def mapping_dmabufs_fails_and_leaves_nothing() -> dict[str, object]:
    with failing_calls(), Exporter() as exporter, opened() as transport:
        fd = exporter.export(PAGES)
        before = exporter.held()
        met = {}
        for case in MAP_DMABUF:
            met |= fails_as_told((case,), lambda: map_of(transport._fd, 0, fd))
            assert exporter.held() == before, (case, exporter.held())
        assert stats()["attached_bytes"] == 0
        map_of(transport._fd, 0, fd)
        os.close(fd)
        transport.close()
    return {"met": met}


@check()
def interrupts_fail_and_leave_nothing() -> dict[str, object]:
    with failing_calls(), opened() as transport:
        event = os.eventfd(0)
        vector = uapi.Vector.new(vector=0, fd=event)
        met = fails_as_told(VECTOR, lambda: uapi.call(transport._fd, uapi.SET_VECTOR, vector))
        uapi.call(transport._fd, uapi.SET_VECTOR, vector)
        os.close(event)
    return {"met": met}


@check()
def opening_fails_and_leaves_nothing() -> dict[str, object]:
    with failing_calls():
        met = fails_as_told(OPEN, lambda: os.close(os.open(NODE, os.O_RDWR)))
        # Without interrupts, queues are polled.
        with failing(("pci_alloc_irq_vectors_affinity", "pci_alloc_irq_vectors"), -errno.ENOSPC), opened() as transport:
            assert transport.info.vectors == 0
            assert outcome(lambda: uapi.call(transport._fd, uapi.SET_VECTOR, uapi.Vector.new(vector=0, fd=-1)))
            client = Client(transport)
            assert client.identify(transport.allocate(4096))[4:9] == b"first"
            client.disable()
    return {"met": met}


@check()
def binding_fails_and_leaves_nothing() -> dict[str, object]:
    driver = Path("/sys/bus/pci/drivers/gpunvme")

    def bind() -> None:
        (driver / "bind").write_text(BDF)

    with failing_calls():
        (driver / "unbind").write_text(BDF)
        met = fails_as_told(BIND, bind)
        assert not os.path.exists(NODE)
        bind()
        with nvme.open(f"kmod:{NODE}", queues=1) as controller:
            into = np.zeros(4096, np.uint8)
            controller.namespace(1).read_into(into, lba=(8 << 20) // 512)
    assert np.array_equal(into, contents(1, 4096))
    return {"met": met}


@check()
def memory_goes_away_while_it_is_mapped() -> None:
    """Mapped memory stays pinned whatever its owner does: it is never somebody else's while the drive writes there."""
    with opened() as transport:
        client = Client(transport)
        memory = mmap.mmap(-1, 4096)
        address = np.frombuffer(memory, np.uint8).ctypes.data
        held = transport.map(address, 4096)
        memory.madvise(mmap.MADV_DONTNEED)
        assert client.command(6, prp1=held.iova(), cdw10=1) == 0
        held.close()
        client.disable()
    assert stats()["pinned_bytes"] == 0
