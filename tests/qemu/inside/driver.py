"""In a guest: the driver against QEMU's NVMe controllers, and against what the kernel's own driver reads and writes.

0000:00:08.0 "first" has namespaces 1 (512-byte blocks), 2 (4096) and 3 (512); 0000:00:0b.0 "small" has 4096-byte
blocks, moves at most 8 KiB a command and has one pair of I/O queues. GUEST_WAY is how they are opened.
"""

from __future__ import annotations

import mmap
import os
import signal
import threading
import time

import numpy as np
from checking import check, modprobe, namespace_path, refusal

from gpunvme import nvme
from gpunvme.errors import CommandError, Error, UnsafeDeviceError
from gpunvme.nvme.bind import bind, unbind
from gpunvme.nvme.identify import Oncs

FIRST, SMALL = "0000:00:08.0", "0000:00:0b.0"
NAMESPACES = {(FIRST, 1): 512, (FIRST, 2): 4096, (FIRST, 3): 512, (SMALL, 1): 4096}
MIB = 1 << 20
WAY = os.environ.get("GUEST_WAY", "group")
NOIOMMU = WAY == "noiommu"


def uri(address: str) -> str:
    return f"pci:{address}?noiommu=1" if NOIOMMU else f"pci:{address}?via={WAY}"


def contents(seed: int, nbytes: int) -> np.ndarray:
    """Bytes of which no two ranges are alike, another for each seed."""
    return np.random.default_rng(seed).integers(0, 256, nbytes, np.uint8)


def aligned(data: np.ndarray) -> mmap.mmap:
    page = mmap.mmap(-1, len(data))
    page[:] = data.tobytes()
    return page


def with_kernel(address: str, nsid: int, offset: int, nbytes: int = 0, data: np.ndarray | None = None) -> bytes:
    """Read or write by the kernel's driver, past its page cache."""
    fd = os.open(namespace_path(address, nsid), os.O_RDWR | os.O_DIRECT)
    try:
        if data is None:
            page = mmap.mmap(-1, nbytes)
            assert os.preadv(fd, [page], offset) == nbytes
            return page[:]
        assert os.pwritev(fd, [aligned(data)], offset) == len(data)
        return b""
    finally:
        os.close(fd)


@check()
def kernel_writes_first() -> None:
    modprobe("nvme")
    for number, (address, nsid) in enumerate(NAMESPACES):
        with_kernel(address, nsid, 4 * MIB, data=contents(number, 4 * MIB))
    for address in (FIRST, SMALL):
        assert bind(address, noiommu=NOIOMMU).after == "vfio-pci"


@check()
def what_the_kernel_wrote_is_read() -> dict[str, object]:
    said = {}
    for number, (address, nsid) in enumerate(NAMESPACES):
        with nvme.open(uri(address)) as controller:
            namespace = controller.namespace(nsid)
            block = NAMESPACES[address, nsid]
            assert namespace.block_size == block
            into = np.zeros(4 * MIB, np.uint8)
            done = namespace.read_into(into, lba=4 * MIB // block)
            assert np.array_equal(into, contents(number, 4 * MIB)), (address, nsid)
            # With an IOMMU, the controller writes to the array itself.
            assert (done.bounced_bytes == 0) != NOIOMMU, str(done)
            said[f"{address} {nsid}"] = str(done)
    return said


@check()
def controllers_are_described() -> dict[str, object]:
    with nvme.open(uri(FIRST)) as controller:
        assert controller.info.sn.strip() == "first", controller.info
        assert controller.namespace_ids() == [1, 2, 3]
        assert controller.namespace(2).blocks == 32 * MIB // 4096
        smart = controller.smart()
        assert controller.error_log() is not None
    with nvme.open(uri(SMALL)) as controller:
        assert len(controller.io_queues) == 1
        assert controller.max_bytes == 8192
    return {"smart": str(smart)[:400]}


@check(seconds=90)
def any_memory_will_do() -> None:
    """Every way memory can lie: page offsets, sizes around a page, the most a command moves, and one more."""
    with nvme.open(uri(SMALL)) as controller:
        namespace = controller.namespace(1)
        data = contents(3, 4 * MIB)
        room = np.zeros(MIB + 8192, np.uint8)
        start = -room.ctypes.data % 4096
        for skip in (0, 1, 4, 512, 4095):
            for nbytes in (4096, 8192, 12288, 65536, 16 * 4096 + 4096, 256 << 10):
                room[:] = 0
                into = room[start + skip : start + skip + nbytes]
                namespace.read_into(into, lba=MIB // 1024)
                assert np.array_equal(into, data[:nbytes]), (skip, nbytes)
                assert not room[: start + skip].any(), "bytes before the destination were written"
                assert not room[start + skip + nbytes :].any(), "bytes behind the destination were written"


@check()
def gathers_are_packed_in_order() -> None:
    places = np.random.default_rng(5).integers(0, 1024, 700)
    for address, nsid, number in ((FIRST, 2, 1), (SMALL, 1, 3)):
        with nvme.open(uri(address)) as controller:
            rows = controller.namespace(nsid).gather(places + 1024, blocks=1)
            wanted = contents(number, 4 * MIB).reshape(1024, 4096)[places]
            assert np.array_equal(rows.numpy(), wanted)


@check()
def tiny_queues_carry_everything() -> None:
    for depth in (2, 3):
        with nvme.open(uri(FIRST), queues=1, depth=depth) as controller:
            into = np.zeros(MIB, np.uint8)
            controller.namespace(1).gather(8192 + np.arange(2048), out=into)
            assert np.array_equal(into, contents(0, 4 * MIB)[:MIB])


@check()
def many_threads_share_the_queues() -> None:
    with nvme.open(uri(FIRST), queues=2, depth=16) as controller:
        namespace = controller.namespace(1)
        wrong: list[object] = []

        def reader(seed: int) -> None:
            data = contents(0, 4 * MIB)
            for place in np.random.default_rng(seed).integers(0, 8192 - 64, 20):
                into = np.zeros(64 * 512, np.uint8)
                namespace.read_into(into, lba=8192 + int(place))
                if not np.array_equal(into, data[place * 512 : (place + 64) * 512]):
                    wrong.append(place)

        threads = [threading.Thread(target=reader, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong


@check()
def commands_without_data() -> None:
    with nvme.open(uri(FIRST)) as controller:
        namespace = controller.namespace(3)
        data = contents(9, 64 << 10)
        namespace.write_from(data, lba=100)
        namespace.flush()
        namespace.compare(data, lba=100)
        namespace.write_zeroes(110, 4)
        data[10 * 512 : 14 * 512] = 0
        assert np.array_equal(namespace.read(100, 128).numpy().ravel(), data)
        if controller.info.oncs & Oncs.VERIFY:  # QEMU has it and does not say so
            namespace.verify(100, 128)
        namespace.trim([(100, 8), (120, 8)])
        said = refusal(CommandError, namespace.compare, contents(10, 4096), lba=100)
        assert "SCT 2h, SC 85h" in said, said  # Compare Failure


@check(seconds=90)
def reset_under_load_loses_nothing() -> dict[str, object]:
    with nvme.open(uri(FIRST), queues=2, depth=32, timeout=5) as controller:
        namespace = controller.namespace(2)
        stop = threading.Event()
        wrong: list[object] = []
        rounds = [0, 0]

        def worker(which: int) -> None:
            try:
                while not stop.is_set():
                    data = contents(100 * which + rounds[which], MIB)
                    namespace.write_from(data, lba=2048 + 512 * which)
                    into = np.zeros(MIB, np.uint8)
                    namespace.read_into(into, lba=2048 + 512 * which)
                    if not np.array_equal(into, data):
                        wrong.append(("data differs", which, rounds[which]))
                    rounds[which] += 1
            except BaseException as error:  # noqa: BLE001 - the main thread judges
                wrong.append(repr(error))

        threads = [threading.Thread(target=worker, args=(which,)) for which in range(2)]
        for thread in threads:
            thread.start()
        for _ in range(6):
            time.sleep(0.4)
            controller.reset()
        stop.set()
        for thread in threads:
            thread.join()
        assert not wrong, wrong
        assert controller.resets == 6
        assert all(rounds), rounds
        return {"rounds": rounds}


@check(seconds=90)
def killed_process_leaves_nothing_behind() -> None:
    """Nothing is torn down in order; the kernel must end the DMA before it frees the memory."""

    def write_for_ever(started: int) -> None:
        controller = nvme.open(uri(FIRST))
        namespace = controller.namespace(3)
        data = np.full(4 * MIB, 0x5A, np.uint8)
        while True:
            namespace.write_from(data, lba=16384)
            os.write(started, b".")

    for _ in range(3):
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                write_for_ever(write)
            finally:
                os._exit(1)
        os.close(write)
        assert os.read(read, 1) == b".", "the child could not write"
        time.sleep(0.1)
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        os.close(read)
        assert os.WTERMSIG(status) == signal.SIGKILL
        with nvme.open(uri(FIRST)) as controller:
            namespace = controller.namespace(3)
            into = namespace.read(16384, 8192).numpy()
            # What was acknowledged is there.
            assert np.all(into == 0x5A)
            data = contents(11, MIB)
            namespace.write_from(data, lba=16384)
            assert np.array_equal(namespace.read(16384, 2048).numpy().ravel(), data)


@check()
def closing_under_load_frees_nothing_too_early() -> None:
    for _ in range(5):
        controller = nvme.open(uri(FIRST))
        into = np.zeros(8 * MIB, np.uint8)
        job = controller.namespace(1).read_into(into, wait=False)
        controller.close()
        try:
            job.wait(timeout=20)
        except (Error, ValueError):
            pass
        del into, job


@check()
def data_on_it_is_not_written_over() -> None:
    """Also when the kernel cannot look any more: the driver reads before it writes."""
    with nvme.open(uri(FIRST)) as controller:
        namespace = controller.namespace(3)
        table = np.zeros(512, np.uint8)
        table[:8] = np.frombuffer(b"EFI PART", np.uint8)
        namespace.write_from(table, lba=1)
    with nvme.open(uri(FIRST)) as controller:
        said = refusal(UnsafeDeviceError, controller.namespace(3).write_from, np.zeros(512, np.uint8), lba=0)
        assert "GPT" in said, said
        assert f"overwrite='{FIRST}'" in said, said
    with nvme.open(uri(FIRST), overwrite=FIRST) as controller:
        controller.namespace(3).write_from(np.zeros(512, np.uint8), lba=1)


@check()
def kernel_reads_what_was_written() -> None:
    written = {}
    for number, (address, nsid) in enumerate(NAMESPACES):
        with nvme.open(uri(address)) as controller:
            namespace = controller.namespace(nsid)
            data = contents(50 + number, 2 * MIB)
            namespace.write_from(data, lba=8 * MIB // namespace.block_size)
            namespace.flush()
            written[address, nsid] = data
    for address in (FIRST, SMALL):
        assert unbind(address).after == "nvme"
    for (address, nsid), data in written.items():
        assert with_kernel(address, nsid, 8 * MIB, 2 * MIB) == data.tobytes(), (address, nsid)
        # And what the kernel wrote before is still there.
    assert with_kernel(FIRST, 1, 4 * MIB, 4 * MIB) == contents(0, 4 * MIB).tobytes()
