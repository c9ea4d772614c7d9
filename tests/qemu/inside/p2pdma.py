"""In a guest: files into and out of another controller's memory, and the kernel's word on what moved them.

"near" and the peer, whose controller memory buffer has 64 MiB, are behind one PCIe switch; "far" is behind no bridge.
"""

from __future__ import annotations

import hashlib
import os
import re
import threading
from pathlib import Path

import numpy as np
from checking import check, modprobe, namespace_path, refusal, shell

import gpunvme
from gpunvme.errors import PathError, SpanError, TruncatedError
from gpunvme.p2pdma import movement, probe, requests

NEAR, PEER, FAR = "0000:03:00.0", "0000:04:00.0", "0000:00:09.0"
TRACING = Path("/sys/kernel/tracing")
MIB = 1 << 20
MOUNT = Path("/run/near")


def contents(seed: int, nbytes: int) -> np.ndarray:
    """Bytes of which no two ranges are alike, another for each seed."""
    return np.random.default_rng(seed).integers(0, 256, nbytes, np.uint8)


def dropped(name: Path, data: np.ndarray) -> Path:
    """Write a file and have the page cache forget it."""
    with name.open("wb") as file:
        file.write(data.tobytes())
        file.flush()
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return name


class Witness:
    """What the kernel did for a drive meanwhile: sectors moved, and memory of the host's given to it.

    The DMA API maps host memory for a drive and traces each range (``dma:dma_map_phys``); the addresses of a peer
    behind the same switch are bus addresses, which never come there. ``__pci_p2pdma_update_state`` finds them out.
    """

    def __init__(self, nsid: int = 1) -> None:
        name = os.path.basename(namespace_path(NEAR, nsid))
        self._stat = Path(f"/sys/class/block/{name}/stat")

    def __enter__(self) -> Witness:
        (TRACING / "trace").write_text("")
        self._before = self._sectors()
        (TRACING / "tracing_on").write_text("1")
        return self

    def __exit__(self, *_: object) -> None:
        (TRACING / "tracing_on").write_text("0")
        self.read, self.written = (
            512 * (now - before) for now, before in zip(self._sectors(), self._before, strict=True)
        )
        text = (TRACING / "trace").read_text()
        mapped = re.findall(rf"dma_map_phys: {NEAR} .*?size=(\d+)", text)
        self.host_bytes = sum(map(int, mapped))
        self.peers = len(re.findall(r"p2pdma_peer", text))

    def _sectors(self) -> tuple[int, int]:
        numbers = self._stat.read_text().split()
        return int(numbers[2]), int(numbers[6])

    def prove(self, read: int = 0, written: int = 0, host: int = 0) -> dict[str, int]:
        """The drive moved so much, and of host memory it was given ``host`` bytes at most."""
        assert self.read >= read, (self.read, read)
        assert self.written >= written, (self.written, written)
        assert self.host_bytes <= host, f"{self.host_bytes} bytes of host memory were mapped for the drive"
        assert self.peers > 0, "the kernel saw no peer's memory"
        return {"read": self.read, "written": self.written, "host": self.host_bytes, "peers": self.peers}


@check()
def memory_is_mapped_and_given_back() -> dict[str, object]:
    modprobe("nvme", "crc32c_generic", "ext4", "xfs")
    for address in (NEAR, PEER, FAR):
        namespace_path(address)
    shell(f"mount -t tracefs tracing {TRACING}")
    (TRACING / "kprobe_events").write_text("p:p2pdma_peer __pci_p2pdma_update_state\n")
    (TRACING / "tracing_on").write_text("0")
    (TRACING / "events/kprobes/p2pdma_peer/enable").write_text("1")
    (TRACING / "events/dma/dma_map_phys/enable").write_text("1")
    (TRACING / "buffer_size_kb").write_text("4096")

    available = Path(f"/sys/bus/pci/devices/{PEER}/p2pmem/available")
    before = int(available.read_text())
    with gpunvme.P2pMemory(PEER, 5 * MIB + 1) as memory:
        assert before - int(available.read_text()) == 5 * MIB + 8192
        memory.numpy()[:] = contents(1, memory.nbytes)
        assert np.array_equal(memory.numpy(), contents(1, memory.nbytes))
    assert int(available.read_text()) == before
    said = refusal(SpanError, gpunvme.P2pMemory, PEER, 65 * MIB)
    assert "are free" in said, said
    for address in (NEAR, FAR):
        said = refusal(PathError, gpunvme.P2pMemory, address, MIB)
        assert "no controller memory buffer" in said, said
    return {"bar": [int(word, 16) for word in bar_of(PEER)]}


def bar_of(address: str) -> tuple[str, str]:
    """The range of the largest BAR."""
    lines = Path(f"/sys/bus/pci/devices/{address}/resource").read_text().splitlines()[:6]
    start, end, _ = max((line.split() for line in lines), key=lambda words: int(words[1], 16) - int(words[0], 16))
    return start, end


@check(seconds=120)
def a_file_goes_into_it_and_out_of_it() -> dict[str, object]:
    MOUNT.mkdir()
    shell(f"mkfs.ext4 -q -E nodiscard {namespace_path(NEAR)} && mount {namespace_path(NEAR)} {MOUNT}")
    data = contents(2, 8 * MIB + 1000)
    name = dropped(MOUNT / "file", data)
    with gpunvme.P2pMemory(PEER, len(data)) as memory, gpunvme.open(name, "r") as file:
        assert file.explain(memory).chosen == "p2pdma", str(file.explain(memory))
        with Witness() as into:
            done = file.read_into(memory)
        assert done.path == "p2pdma", str(done)
        assert (done.direct_bytes, done.bounced_bytes) == (len(data), 1000 - 512), str(done)
        facts = into.prove(read=8 * MIB, host=8192)
        assert np.array_equal(memory.numpy(), data)
        assert not resident(name), "it was read through the page cache"

        with gpunvme.open(MOUNT / "copy", "w") as copy:
            # Until the file system has room on the drive for it, it would move more than data.
            copy.write_from(np.zeros(len(data), np.uint8), fsync=True)
            with Witness() as out:
                wrote = copy.write_from(memory)
            assert (wrote.path, wrote.bounced_bytes) == ("p2pdma", 1000), str(wrote)
            facts_out = out.prove(written=8 * MIB, host=64 << 10)
            copy.flush()
        os.sync()
        dropped_cache()
        assert np.array_equal(np.fromfile(MOUNT / "copy", np.uint8), data)
    return {"into": facts, "out": facts_out, "said": str(done), "moved": 2 * 8 * MIB}


def resident(name: Path) -> int:
    from gpunvme import _native

    with name.open("rb") as file:
        return _native.cached_bytes(file.fileno(), 0, name.stat().st_size) or 0


def dropped_cache() -> None:
    Path("/proc/sys/vm/drop_caches").write_text("3")


@check()
def the_proof_fails_for_what_bounces() -> dict[str, object]:
    found = {}
    with gpunvme.P2pMemory(PEER, 4 * MIB) as memory:
        data = contents(3, 4 * MIB)
        name = dropped(MOUNT / "bounced", data)
        # The page cache and the processor.
        with name.open("rb") as plain, Witness() as witness:
            memory.numpy()[:] = np.frombuffer(plain.read(), np.uint8)
        found["buffered"] = refusal(AssertionError, witness.prove, read=4 * MIB, host=8192)
        # Our own bounce buffer, as if the kernel had refused.
        dropped_cache()
        real = requests.cut
        movement.cut = lambda *arguments: real(*arguments[:-1], True)
        try:
            with gpunvme.open(name, "r") as file, Witness() as witness:
                done = file.read_into(memory)
        finally:
            movement.cut = real
        assert done.bounced_bytes == 4 * MIB
        found["bounced"] = refusal(AssertionError, witness.prove, read=4 * MIB, host=8192)
        assert np.array_equal(memory.numpy(), data)
    assert all("bytes of host memory" in said for said in found.values()), found
    return found


@check(seconds=120)
def cached_and_dirty_bytes_come_from_the_drive() -> None:
    data = contents(4, 2 * MIB)
    name = MOUNT / "dirty"
    name.write_bytes(data.tobytes())  # neither flushed nor dropped
    with gpunvme.P2pMemory(PEER, 2 * MIB) as memory, gpunvme.open(name, "r") as file:
        with Witness() as witness:
            done = file.read_into(memory)
        assert (done.direct_bytes, done.cached_bytes, done.bounced_bytes) == (2 * MIB, 0, 0), str(done)
        assert witness.read >= 2 * MIB, "it was copied out of the page cache"
        assert np.array_equal(memory.numpy(), data)


@check(seconds=120)
def many_files_and_ragged_ranges() -> dict[str, object]:
    random = np.random.default_rng(5)
    sizes = [int(size) for size in random.integers(1, 200_000, 40)]
    names = [dropped(MOUNT / f"many{i}", contents(100 + i, size)) for i, size in enumerate(sizes)]
    with gpunvme.P2pMemory(PEER, sum(sizes) + 4096 * len(sizes)) as memory:
        files = [gpunvme.open(name, "r") for name in names]
        parts, at = [], 0
        for file, size in zip(files, sizes, strict=True):
            parts.append((file, 0, memory.span.part(at, size)))
            at += -(-size // 4096) * 4096
        done = gpunvme.read_many(parts)
        for (_, _, span), size, i in zip(parts, sizes, range(40), strict=True):
            start = span.ptr - memory.ptr
            assert np.array_equal(memory.numpy()[start : start + size], contents(100 + i, size)), i
        assert done.bounced_bytes <= 511 * len(sizes), str(done)
        for file in files:
            file.close()
        whole = contents(6, 2 * MIB)
        name = dropped(MOUNT / "ragged", whole)
        with gpunvme.open(name, "r+") as file:
            straight = 0
            for i in range(20):
                offset, nbytes, place = (int(each) for each in random.integers(1, 500_000, 3))
                place += (offset - place) % 512 if i % 2 else 0  # else nothing can go straight
                span = memory.span.part(place, nbytes)
                read = file.read_into(span, offset)
                straight += read.nbytes - read.bounced_bytes
                same = np.array_equal(memory.numpy()[place : place + nbytes], whole[offset : offset + nbytes])
                assert same, (offset, nbytes, place)
            assert straight > MIB, straight
            for i in range(10):
                offset, nbytes, place = (int(each) for each in random.integers(1, 500_000, 3))
                place += (offset - place) % 512 if i % 2 else 0
                whole[offset : offset + nbytes] = memory.numpy()[place : place + nbytes]
                file.write_from(memory.span.part(place, nbytes), offset)
            file.flush()
            dropped_cache()
            assert np.array_equal(np.fromfile(name, np.uint8), whole)
    return {"said": str(done)}


@check(seconds=120)
def a_file_is_cut_off_under_the_read() -> dict[str, object]:
    name = dropped(MOUNT / "shrinks", contents(7, 16 * MIB))
    ended = 0
    with gpunvme.P2pMemory(PEER, 16 * MIB) as memory, gpunvme.open(name, "r") as file:
        for cut_at in (0, 4096, 5 * MIB + 100):
            os.truncate(name, 16 * MIB)
            start = threading.Barrier(2)

            def cut(to: int = cut_at, start: threading.Barrier = start) -> None:
                start.wait()
                os.truncate(name, to)

            cutter = threading.Thread(target=cut)
            cutter.start()
            start.wait()
            try:
                file.read_into(memory)
            except (TruncatedError, gpunvme.RangeError):  # it was short already
                ended += 1
            cutter.join()
        # As it is seen for sure: the size was asked for before.
        os.truncate(name, 16 * MIB)
        real = requests.carry_direct
        requests.carry_direct = lambda piece, write: (os.truncate(name, 5 * MIB + 100), real(piece, write))[1]
        try:
            said = refusal(TruncatedError, file.read_into, memory)
        finally:
            requests.carry_direct = real
    assert str(name) in said, said
    return {"ended": ended, "said": said}


@check(seconds=120)
def loads_from_threads_are_whole() -> None:
    names = [dropped(MOUNT / f"load{i}", contents(200 + i, 2 * MIB + 77 * i)) for i in range(4)]
    failures: list[BaseException] = []

    def load(i: int) -> None:
        try:
            with gpunvme.P2pMemory(PEER, 3 * MIB) as memory, gpunvme.open(names[i], "r") as file:
                for _ in range(2):
                    nbytes = file.size
                    file.read_into(memory, nbytes=nbytes)
                    digest = hashlib.sha256(memory.numpy()[:nbytes].tobytes()).digest()
                    assert digest == hashlib.sha256(contents(200 + i, nbytes).tobytes()).digest(), i
                    transfer = file.read_into(memory, nbytes=nbytes, wait=False)
                    transfer.cancel()
                    try:
                        transfer.wait(30)
                    except gpunvme.Cancelled:
                        pass
        except BaseException as error:  # noqa: BLE001 - judged below
            failures.append(error)

    threads = [threading.Thread(target=load, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(90)
    assert not failures, failures


@check()
def what_cannot_be_reached_is_refused_with_the_reason() -> dict[str, object]:
    far = Path("/run/far")
    far.mkdir()
    shell(f"mkfs.ext4 -q -E nodiscard {namespace_path(FAR)} && mount {namespace_path(FAR)} {far}")
    data = contents(8, MIB)
    said = {}
    with gpunvme.P2pMemory(PEER, MIB) as memory:
        with gpunvme.open(dropped(far / "file", data), "r", path="p2pdma") as file:
            said["no way"] = refusal(PathError, file.read_into, memory)
        with gpunvme.open(far / "file", "r") as file:
            done = file.read_into(memory)
            assert (done.path, done.bounced_bytes) == ("host", MIB), str(done)
            said["bounced"] = done.reason
        assert np.array_equal(memory.numpy(), data)
        # Where no probe can tell beforehand: a new file.
        probe.forget()
        with gpunvme.open(far / "new", "w") as file:
            done = file.write_from(memory, fsync=True)
            assert (done.path, done.bounced_bytes) == ("host", MIB), str(done)
        dropped_cache()
        assert np.array_equal(np.fromfile(far / "new", np.uint8), data)
        shm = Path("/dev/shm/file")
        shm.write_bytes(data.tobytes())
        with gpunvme.open(shm, "r", path="auto") as file:
            said["memory"] = file.read_into(memory).reason
        said["memory, forced"] = refusal(PathError, gpunvme.open, shm, "r", path="p2pdma")
    assert "share no PCI bridge" in said["no way"], said
    assert "share no PCI bridge" in said["bounced"], said
    return said


@check(seconds=120)
def xfs_goes_the_same_way() -> dict[str, object]:
    xfs = Path("/run/xfs")
    xfs.mkdir()
    drive = namespace_path(NEAR, 2)
    shell(f"mkfs.xfs -q -f -K {drive} && mount {drive} {xfs}")
    data = contents(9, 4 * MIB + 300)
    name = dropped(xfs / "file", data)
    with gpunvme.P2pMemory(PEER, len(data)) as memory, gpunvme.open(name, "r", path="p2pdma") as file:
        with Witness(2) as witness:
            done = file.read_into(memory)
        facts = witness.prove(read=4 * MIB, host=8192)
        assert np.array_equal(memory.numpy(), data)
        with gpunvme.open(xfs / "copy", "w") as copy:
            copy.write_from(memory, fsync=True)
        dropped_cache()
        assert np.array_equal(np.fromfile(xfs / "copy", np.uint8), data)
    return {"facts": facts, "said": str(done)}
