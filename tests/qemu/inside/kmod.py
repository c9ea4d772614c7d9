"""In a guest with an IOMMU: gpunvme's kernel module, and the driver through it.

0000:00:08.0, serial number "first", has three namespaces; 0000:00:0c.0, "slow", takes 30 commands a second.
GUEST_MODULES is a folder of modules, built for this kernel, GUEST_SELFTEST the module's program for people.
"""

from __future__ import annotations

import mmap
import os
import resource
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
from checking import as_nobody, check, in_child, modprobe, namespace_path, refusal, shell
from client import Client
from kmod_device import BDF, DEBUG, LONG, MIB, NODE, SLOW, SLOW_NODE, URI, contents, load, opened, page_of, stats

from gpunvme import nvme
from gpunvme.errors import TransportError
from gpunvme.nvme import kmod_uapi as uapi
from gpunvme.nvme import sysfs
from gpunvme.nvme.bind import bind, unbind, user_nodes
from gpunvme.nvme.kmod import KmodTransport
from gpunvme.nvme.vfio_group import LockedMemoryError


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
def mappings_are_limited() -> None:
    limit = Path("/sys/module/gpunvme/parameters/max_mappings")
    before = limit.read_text()
    with opened() as transport:
        assert transport.info.max_mappings == int(before)
        limit.write_text("2")
        try:
            held = [transport.allocate(4096) for _ in range(2)]
            said = refusal(LockedMemoryError, transport.allocate, 4096)
            assert str(limit) in said, said
            held[0].close()
            transport.allocate(4096)
        finally:
            limit.write_text(before)
        transport.allocate(4096)


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


def child_under_load(node: str, timeout: float) -> int:
    """Start a child that reads all the time, into memory of its own; return its pid when it does.

    ``timeout``: seconds until it looks at registers, because a command was not answered.
    """
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        try:
            with nvme.open(f"kmod:{node}", queues=1, timeout=timeout) as controller:
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
        child = child_under_load(SLOW_NODE, timeout=60)
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
    child = child_under_load(SLOW_NODE, timeout=5)
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


@check(seconds=60)
def selftest_passes() -> dict[str, object]:
    done = subprocess.run([os.environ["GUEST_SELFTEST"], NODE], capture_output=True, text=True, check=False, timeout=50)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "not ok" not in done.stdout
    return {"said": done.stdout}
