"""In a guest with an IOMMU: gpunvme's kernel module, and the driver through it.

0000:00:08.0, serial number "first", has three namespaces; 0000:00:0c.0, "slow", takes 30 commands a second.
GUEST_MODULE is the module, built for this kernel, GUEST_SELFTEST its program for people.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
import random
import resource
import signal
import struct
import subprocess
import time
from pathlib import Path

import numpy as np
from checking import as_nobody, check, in_child, modprobe, namespace_path, refusal, shell
from client import Client

from gpunvme import nvme
from gpunvme.errors import TransportError
from gpunvme.nvme import kmod_uapi as uapi
from gpunvme.nvme import sysfs
from gpunvme.nvme.bind import bind, unbind, user_nodes
from gpunvme.nvme.kmod import KmodTransport
from gpunvme.nvme.queues import QueuePair
from gpunvme.nvme.vfio_group import LockedMemoryError

BDF, SLOW = "0000:00:08.0", "0000:00:0c.0"
NODE, SLOW_NODE = "/dev/gpunvme0", "/dev/gpunvme1"
URI = f"kmod:{NODE}"
MODULE = os.environ["GUEST_MODULE"]
LONG = os.environ.get("GPUNVME_TEST_LEVEL") == "long"
MIB = 1 << 20
DEBUG = Path("/sys/kernel/debug/gpunvme")


def contents(seed: int, nbytes: int) -> np.ndarray:
    """Bytes of which no two ranges are alike, another for each seed."""
    return np.random.default_rng(seed).integers(0, 256, nbytes, np.uint8)


def page_of(nbytes: int) -> tuple[mmap.mmap, int]:
    memory = mmap.mmap(-1, nbytes)
    return memory, ctypes.addressof(ctypes.c_char.from_buffer(memory))


def stats(address: str = BDF) -> dict[str, int]:
    lines = (DEBUG / address / "stats").read_text().splitlines()
    return {name: int(value) for name, value in map(str.split, lines)}


@contextlib.contextmanager
def opened():
    transport = KmodTransport(NODE)
    try:
        yield transport
    finally:
        transport.close()


def load(*options: str) -> None:
    subprocess.run(["insmod", MODULE, *options], check=True, timeout=60)


@check(seconds=120)
def loaded_and_unloaded_again_and_again() -> None:
    modprobe("nvme")
    for nsid in (1, 2, 3):
        namespace_path(BDF, nsid)
    for _ in range(int(os.environ["GUEST_LOADS"])):
        load()
        # It takes no drive by itself.
        assert sysfs.find_function(BDF).driver == "nvme"
        shell("rmmod gpunvme")
    load("debug=1")
    if not DEBUG.exists():
        shell("mount -t debugfs debugfs /sys/kernel/debug")


@check()
def kernel_writes_first_and_bind_hands_it_over() -> None:
    fd = os.open(namespace_path(BDF), os.O_RDWR | os.O_DIRECT)
    memory, _ = page_of(4 * MIB)
    memory[:] = contents(1, 4 * MIB).tobytes()
    assert os.pwrite(fd, memory, 8 * MIB) == 4 * MIB
    os.close(fd)
    done = bind(BDF, driver="gpunvme")
    assert (done.before, done.after) == ("nvme", "gpunvme"), done
    assert user_nodes(BDF, sysfs.Machine()) == [NODE]


@check()
def identify_arrives() -> None:
    with opened() as transport:
        client = Client(transport)
        memory = transport.allocate(4096)
        assert client.identify(memory)[4:9] == b"first"
        client.disable()
        memory.close()
        client.memory.close()
    now = stats()
    assert (now["pinned_bytes"], now["mapped"]) == (0, now["unmapped"]), now


@check(seconds=120)
def what_the_kernel_wrote_is_read_and_the_other_way_round() -> dict[str, object]:
    with nvme.open(URI, queues=2) as controller:
        namespace = controller.namespace(1)
        into = np.zeros(4 * MIB, np.uint8)
        done = namespace.read_into(into, lba=8 * MIB // 512)
        assert np.array_equal(into, contents(1, 4 * MIB))
        assert done.bounced_bytes == 0, "the controller did not write to the array itself"
        source = contents(2, 4 * MIB)
        namespace.write_from(source, lba=16 * MIB // 512)
        namespace.flush()
        odd = np.zeros(5 * 4096 + 3, np.uint8)[3:]  # begins in the middle of a page
        namespace.read_into(odd, lba=16 * MIB // 512)
        assert np.array_equal(odd, source[: len(odd)])
        said = str(done)
    now = stats()
    assert now["pinned_bytes"] == 0, now
    unbind(BDF)
    fd = os.open(namespace_path(BDF), os.O_RDWR | os.O_DIRECT)
    memory, _ = page_of(4 * MIB)
    assert os.preadv(fd, [memory], 16 * MIB) == 4 * MIB
    os.close(fd)
    assert memory[:] == source.tobytes()
    bind(BDF, driver="gpunvme")
    return {"read": said}


@check()
def memory_is_checked() -> None:
    with opened() as transport:
        memory, address = page_of(64 << 10)
        held = transport.map(address, 64 << 10)
        assert held.iova() % 4096 == 0
        held.close()
        for start, nbytes in ((address + 1, 4096), (address, 0), (address, 100), (0, 4096), (2**64 - 4096, 8192)):
            refusal(TransportError, transport.map, start, nbytes)
        gone, where = page_of(4096)
        del memory
        gone.close()
        refusal(TransportError, transport.map, where, 4096)
        with open("/dev/zero", "rb") as zero:
            read_only = mmap.mmap(zero.fileno(), 4096, prot=mmap.PROT_READ, flags=mmap.MAP_PRIVATE)
        view = np.frombuffer(read_only, np.uint8).ctypes.data
        refusal(TransportError, transport.map, view, 4096)
        refusal(TransportError, transport.map_dmabuf, 0, 0, 4096)
        refusal(TransportError, transport.map_dmabuf, 12345, 0, 4096)


@check()
def locked_memory_is_counted() -> None:
    def child() -> str:
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (1 << 20, 1 << 20))
        with opened() as transport:
            memories = [transport.allocate(512 << 10)]
            text = refusal(LockedMemoryError, transport.allocate, 1 << 20)
            memories[0].close()
            transport.allocate(1 << 20)
            return text

    os.chmod(NODE, 0o666)
    try:
        said = as_nobody(child)
        assert "memlock" in said, said
    finally:
        os.chmod(NODE, 0o600)
    assert "no permission" in as_nobody(lambda: refusal(TransportError, KmodTransport, NODE))


@check()
def one_opener_at_a_time() -> None:
    with opened():
        said = in_child(lambda: refusal(TransportError, KmodTransport, NODE))
        assert "another process drives it" in said, said
    with opened():
        pass


@check()
def interrupt_table_cannot_be_mapped() -> None:
    with opened() as transport:
        info = transport.info
        assert 0x1000 < info.mmap_nbytes <= info.bar_nbytes
        assert info.flags & uapi.INFO_IOMMU
        for nbytes, offset in ((info.mmap_nbytes + 4096, 0), (4096, info.mmap_nbytes), (4096, 1 << 40)):
            refusal(OSError, mmap.mmap, transport._fd, nbytes, offset=offset)
        refusal(OSError, mmap.mmap, transport._fd, 4096, flags=mmap.MAP_PRIVATE)
        refusal(OSError, mmap.mmap, transport._fd, 4096, prot=mmap.PROT_READ | mmap.PROT_EXEC)


@check()
def interrupts_arrive_as_events() -> None:
    with opened() as transport:
        assert transport.info.vectors >= 1
        event = os.eventfd(0, os.EFD_NONBLOCK)
        uapi.call(transport._fd, uapi.SET_VECTOR, uapi.Vector.new(vector=0, fd=event))
        client = Client(transport)
        memory = transport.allocate(4096)
        client.identify(memory)
        give_up = time.monotonic() + 10
        while True:
            try:
                assert os.eventfd_read(event) >= 1
                break
            except BlockingIOError:
                assert time.monotonic() < give_up, "no interrupt of the admin queue arrived"
                time.sleep(0.01)
        uapi.call(transport._fd, uapi.SET_VECTOR, uapi.Vector.new(vector=0, fd=-1))
        client.identify(memory)
        refusal(BlockingIOError, os.eventfd_read, event)
        refusal(OSError, uapi.call, transport._fd, uapi.SET_VECTOR, uapi.Vector.new(vector=5000, fd=event))
        client.disable()


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
        client.disable()


def child_under_load(node: str) -> int:
    """Start a child that reads all the time, into memory of its own; return its pid when it does."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        try:
            with nvme.open(f"kmod:{node}", queues=1, timeout=60) as controller:
                namespace = controller.namespace(1)
                namespace.read(0, 1)
                os.write(write, b"go")
                into = np.zeros(16 * MIB, np.uint8)
                while True:
                    namespace.read_into(into, lba=0)
        finally:
            os._exit(0)
    os.close(write)
    assert os.read(read, 2) == b"go", "the child did not get to work"
    os.close(read)
    return child


@check(seconds=120)
def killed_under_load_leaves_nothing() -> None:
    """Commands are still on their way, and the memory that they name is given back: no IOMMU fault may follow."""
    bind(SLOW, driver="gpunvme")
    before = stats(SLOW)["quiesced"]
    for _ in range(10 if LONG else 2):
        child = child_under_load(SLOW_NODE)
        give_up = time.monotonic() + 10
        while stats(SLOW)["pinned_bytes"] <= 16 * MIB:  # the array, and queues
            assert time.monotonic() < give_up, stats(SLOW)
        time.sleep(0.2)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        give_up = time.monotonic() + 10
        while stats(SLOW)["pinned_bytes"]:
            assert time.monotonic() < give_up, stats(SLOW)
            time.sleep(0.01)
        time.sleep(2)  # what was sent would be carried out by now
    assert stats(SLOW)["quiesced"] > before
    with nvme.open(f"kmod:{SLOW_NODE}", queues=1, timeout=60) as controller:
        assert not controller.namespace(1).read(0, 1).numpy().any()


@check(seconds=120)
def taken_away_under_load() -> None:
    child = child_under_load(SLOW_NODE)
    time.sleep(0.5)
    Path(f"/sys/bus/pci/devices/{SLOW}/driver/unbind").write_text(SLOW)
    # What the child sees is a BAR that is gone (SIGBUS), or errors.
    give_up = time.monotonic() + 60
    while os.waitpid(child, os.WNOHANG) == (0, 0):
        assert time.monotonic() < give_up, "the child neither ends nor fails"
        time.sleep(0.05)
    time.sleep(2)
    assert not Path(SLOW_NODE).exists()
    Path("/sys/bus/pci/drivers_probe").write_text(SLOW)
    assert sysfs.find_function(SLOW).driver == "gpunvme"
    unbind(SLOW)


@check(seconds=60)
def debugfs_lists_mappings() -> None:
    with opened() as transport:
        memory = transport.allocate(3 * 4096)
        lines = (DEBUG / BDF / "mappings").read_text().splitlines()
        assert any(" user rw 12288 " in line for line in lines), lines
        memory.close()
        assert len((DEBUG / BDF / "mappings").read_text().splitlines()) == 1


# --- dma-bufs: memory of the kernel's udmabuf stands for another device's


class Udmabuf(ctypes.Structure):
    """struct udmabuf_create, include/uapi/linux/udmabuf.h."""

    _fields_ = (
        ("memfd", ctypes.c_uint32),
        ("flags", ctypes.c_uint32),
        ("offset", ctypes.c_uint64),
        ("size", ctypes.c_uint64),
    )


UDMABUF_CREATE = 1 << 30 | ctypes.sizeof(Udmabuf) << 16 | ord("u") << 8 | 0x42


def new_dmabuf(nbytes: int) -> tuple[int, mmap.mmap]:
    """A dma-buf, and its memory."""
    memfd = os.memfd_create("dmabuf", os.MFD_ALLOW_SEALING | os.MFD_CLOEXEC)
    os.ftruncate(memfd, nbytes)
    fcntl.fcntl(memfd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
    with open("/dev/udmabuf", "rb+", buffering=0) as device:
        fd = fcntl.ioctl(device, UDMABUF_CREATE, Udmabuf(memfd=memfd, offset=0, size=nbytes))
    memory = mmap.mmap(memfd, nbytes)
    os.close(memfd)
    return fd, memory


def has_udmabuf() -> bool:
    return os.path.exists("/dev/udmabuf")


@check(seconds=120)
def data_goes_into_a_dmabuf_and_out_of_it() -> dict[str, object]:
    if not has_udmabuf():
        return {"skipped": "this kernel has no udmabuf"}
    fd, memory = new_dmabuf(2 * MIB)
    with nvme.open(URI, queues=1) as controller:
        namespace = controller.namespace(1)
        transport = controller.transport
        queue = RawQueue(controller)
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        held = transport.map_dmabuf(fd, 0, 2 * MIB, address)
        os.close(fd)
        lines = (DEBUG / BDF / "mappings").read_text()
        assert " dmabuf rw 2097152 " in lines, lines
        # Straight commands to the bus addresses: 4 KiB a command.
        for page in range(0, 2 * MIB, 4096):
            assert queue.command(2, (8 * MIB + page) // 512, held.iova(page)) == 0
        assert memory[:] == contents(1, 4 * MIB)[: 2 * MIB].tobytes()
        memory[:] = contents(3, 2 * MIB).tobytes()
        for page in range(0, 2 * MIB, 4096):
            assert queue.command(1, (24 * MIB + page) // 512, held.iova(page)) == 0
        into = np.zeros(2 * MIB, np.uint8)
        namespace.read_into(into, lba=24 * MIB // 512)
        assert np.array_equal(into, contents(3, 2 * MIB))
        refusal(TransportError, transport.map_dmabuf, 0, 0, 4096)
        part_fd, part = new_dmabuf(16 << 10)
        refusal(TransportError, transport.map_dmabuf, part_fd, 8 << 10, 16 << 10)
        half = transport.map_dmabuf(part_fd, 8 << 10, 8 << 10)
        assert queue.command(2, 8 * MIB // 512, half.iova(4096)) == 0
        assert part[12 << 10 :] == contents(1, 4 * MIB)[:4096].tobytes()
        queue.close()
        half.close()
        held.close()
    now = stats()
    assert (now["attached_bytes"], now["pinned_bytes"]) == (0, 0), now
    return {}


class RawQueue:
    """An I/O queue pair with one command at a time, which is told bus addresses and nothing else."""

    ENTRIES = 8

    def __init__(self, controller: nvme.Controller) -> None:
        self.controller = controller
        (queue_id,) = controller.take_queue_ids(1)
        self.pair = QueuePair(queue_id, self.ENTRIES, controller.transport, controller.command, 4096)
        self.pair.create()
        self.tail = self.head = 0
        self.phase = 1

    def close(self) -> None:
        self.pair.remove()
        self.pair.free()
        self.controller.give_queue_ids([self.pair.queue_id])

    def command(self, opcode: int, lba: int, prp1: int) -> int:
        entry = struct.pack("<HHIQQQQQI12x", opcode, self.tail, 1, 0, 0, prp1, 0, lba, 7)
        self.pair.submissions.view(self.tail * 64, 64)[:] = entry
        self.tail = (self.tail + 1) % self.ENTRIES
        stride = 4 << self.controller.registers.cap.dstrd
        self.controller.transport.write_register(0x1000 + 2 * self.pair.queue_id * stride, 4, self.tail)
        give_up = time.monotonic() + 10
        while True:
            (word,) = struct.unpack("<H", self.pair.completions.view(16 * self.head + 14, 2))
            if word & 1 == self.phase:
                break
            assert time.monotonic() < give_up, "no completion"
        self.head = (self.head + 1) % self.ENTRIES
        self.phase ^= self.head == 0
        self.controller.transport.write_register(0x1000 + (2 * self.pair.queue_id + 1) * stride, 4, self.head)
        return word >> 1


@check(seconds=60)
def selftest_passes() -> dict[str, object]:
    done = subprocess.run([os.environ["GUEST_SELFTEST"], NODE], capture_output=True, text=True, check=False, timeout=50)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "not ok" not in done.stdout
    return {"said": done.stdout}


# --- callers that mean no good


@check(seconds=150)
def hostile_calls_do_no_harm() -> dict[str, object]:
    seconds = 60 if LONG else 4
    numbers = [uapi.GET_INFO, uapi.MAP, uapi.UNMAP, uapi.SET_VECTOR, uapi.RESET]
    dice = random.Random(7)
    seen: dict[str, int] = {}
    with opened() as transport:
        memory, address = page_of(1 << 20)
        interesting = [0, 1, 7, 4096, 4097, 1 << 20, 1 << 31, 1 << 32, 1 << 40, 2**63, 2**64 - 4096, 2**64 - 1]
        interesting += [address, address + 4096, address + 1]
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            number = dice.choice(numbers)
            if dice.random() < 0.1:
                number = dice.getrandbits(32)
            if dice.random() < 0.2:
                argument = bytearray(dice.randbytes(dice.choice([1, 8, 48, 4096])))
            else:
                argument = bytearray(4096)
                request = uapi.Map.new(
                    flags=dice.choice([0, 1, 1, 2, 2**32 - 1]),
                    address=dice.choice(interesting),
                    nbytes=dice.choice(interesting),
                    addresses=dice.choice([address, *interesting]),
                    fd=dice.choice([-1, -1, 0, 1, transport._fd, 99, 2**31 - 1]),
                    handle=dice.choice([0, 0, 1]),
                )
                if number == uapi.UNMAP:
                    request.flags = dice.choice([1, 2, 3, 1000, 2**32 - 1, 0])  # where the handle is
                ctypes.memmove((ctypes.c_char * 48).from_buffer(argument), ctypes.byref(request), 48)
                if dice.random() < 0.3:
                    argument[0:4] = dice.choice([0, 4, 8, 48, 56, 4096, 4097, 2**31]).to_bytes(4, "little")
                if dice.random() < 0.1:
                    argument[dice.randrange(48, 4096)] = 1
            pointer = (ctypes.c_char * len(argument)).from_buffer(argument)
            where = dice.choice([0, 1, 2**47, address + (1 << 20) - 8]) if dice.random() < 0.1 else pointer
            if not isinstance(where, int):
                where = ctypes.addressof(pointer)
            result = LIBC.ioctl(transport._fd, ctypes.c_ulong(number), ctypes.c_void_p(where))
            name = "ok" if result >= 0 else errno.errorcode[ctypes.get_errno()]
            seen[name] = seen.get(name, 0) + 1
            if dice.random() < 0.01:
                for handle in range(1, 200):
                    with contextlib.suppress(OSError):
                        uapi.call(transport._fd, uapi.UNMAP, uapi.Unmap.new(handle=handle))
        del memory
    assert stats()["pinned_bytes"] == 0, stats()
    assert {"ok", "EINVAL", "EFAULT", "ENOTTY"} <= set(seen), seen
    with opened() as transport:
        client = Client(transport)
        assert client.identify(transport.allocate(4096))[4:9] == b"first", "the controller is not usable any more"
        client.disable()
    return {"answers": seen}


LIBC = ctypes.CDLL(None, use_errno=True)


@check()
def unloading_waits_for_nobody() -> None:
    with opened():
        assert subprocess.run(["rmmod", "gpunvme"], check=False, capture_output=True).returncode != 0
    unbind(BDF)
    shell("rmmod gpunvme")
    assert sysfs.find_function(BDF).driver == "nvme"
