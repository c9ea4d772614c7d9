"""GPU queues whose data, or all, is in GPU memory, and the probe that chooses.

On a real GPU with ``-m gpu``; on the emulated one by tests/soft/test_emulated_gpu_queues.py. test_gpu_queues.py has
what holds in every placement: GPUNVME_TEST_PLACEMENT=data or full runs it there. If this failed, kernels would compute
with bytes that a drive has not written yet, or a machine would use a placement that does not work on it.
"""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gpu_queue_machine import BLOCK, CHILD, EMULATED, GPU, HUNG, PRELUDE, few, rows_of, served, some_lbas

import gpunvme
from gpunvme import nvme
from gpunvme.gpu.driver import Gpu
from gpunvme.gpu.moves import Moves
from gpunvme.memory import Buffer
from gpunvme.nvme.gpu_memory import GPU_PAGE, GpuAccess, GpuDmaMemory
from gpunvme.nvme.soft import SoftTransport
from gpunvme.nvme.uri import parse_uri

if EMULATED:
    from gpu_queue_machine import fake
else:
    pytestmark = pytest.mark.gpu

SIZE = 2 << 20
URI = f"soft:ram?size={SIZE}&threads=2&queues=12"
DATA = np.random.default_rng(6).integers(0, 256, SIZE, np.uint8).tobytes()
EVERYWHERE = ["host", "data", "full"]
ON_GPU = ["data", "full"]


@pytest.fixture
def controller() -> Iterator[Any]:
    with nvme.open(URI, queues=2, timeout=0.5) as opened:
        opened.namespace().write_from(DATA)
        yield opened


def stats(controller: Any) -> dict[str, int]:
    return controller.transport.controller.stats()


def inject(controller: Any, faults: str) -> None:
    controller.transport.controller.inject(faults, 1)


def check_gather(queues: Any, rows: int = 200, blocks: int = 3, seed: int = 1) -> Any:
    lbas = some_lbas(queues.namespace, rows, blocks, seed)
    out = Buffer.empty(rows * blocks * BLOCK, GPU)
    done = queues.gather(lbas, out)
    assert out.numpy().tobytes() == rows_of(DATA, lbas, blocks)
    return done


def check_stream(queues: Any) -> Any:
    whole = Buffer.empty(SIZE, GPU)
    done = queues.stream(0, SIZE, whole)
    assert whole.numpy().tobytes() == DATA
    return done


# --- each placement, by name


@pytest.mark.parametrize("doorbell", ["direct", "forward"])
@pytest.mark.parametrize("placement", EVERYWHERE)
def test_everything_moves_in_every_placement_by_either_doorbell(controller: Any, placement: str, doorbell: str) -> None:
    with controller.namespace().gpu_queues(
        0, count=2, depth=32, placement=placement, doorbell=doorbell, slot_bytes=16384
    ) as queues:
        assert (queues.placement, queues.doorbell) == (placement, doorbell)
        assert queues.reasons[placement].startswith("used: ")
        assert ("orders what others write" in queues.reasons[placement]) == (placement != "host")
        before = stats(controller)
        done = check_gather(queues, rows=100, blocks=40)
        middle = stats(controller)
        check_gather(queues, rows=77, blocks=1)
        done = check_stream(queues)
        source = Buffer.empty(50 * 40 * BLOCK, GPU)
        queues.gather(np.arange(50) * 40, source)
        places = np.random.default_rng(2).permutation(queues.namespace.blocks // 40)[:50] * 40
        queues.scatter(places, source)
        expected = bytearray(DATA)
        for number, lba in enumerate(places):
            expected[lba * BLOCK : (lba + 40) * BLOCK] = DATA[number * 40 * BLOCK : (number + 1) * 40 * BLOCK]
        assert controller.namespace().read().numpy().tobytes() == expected
        # Where bytes really were, by the controller's own counters; and said wherever somebody asks.
        copies = middle["device_copies"] - before["device_copies"]
        commands = middle["commands"] - before["commands"]
        assert middle["device_copied_bytes"] - before["device_copied_bytes"] >= (100 * 40 * BLOCK) * (
            placement != "host"
        )
        assert (copies == 0) == (placement == "host")
        if placement == "full":
            assert copies > 2 * commands  # data, completions, and their entries besides
        assert ("emulated" in done.reason) == (placement != "host")
        assert ("queues and data in GPU memory" in done.reason) == (placement == "full")
        assert stats(controller)["dma_faults"] == stats(controller)["device_copy_errors"] == 0


@pytest.mark.parametrize("placement", ON_GPU)
@pytest.mark.parametrize("options", ["&lba=4096", "&mpsmin=1&mpsmax=1", "&mpsmin=4&mpsmax=4", "&mdts=1", "&dstrd=3"])
def test_other_controllers(placement: str, options: str) -> None:
    with nvme.open(URI + options, queues=2) as opened:
        opened.namespace().write_from(DATA)
        with opened.namespace().gpu_queues(0, count=2, depth=9, placement=placement, slot_bytes=16384) as queues:
            block = queues.namespace.block_size
            lbas = some_lbas(queues.namespace, 60, 3)
            out = Buffer.empty(60 * 3 * block, GPU)
            queues.gather(lbas, out)
            assert out.numpy().tobytes() == rows_of(DATA, lbas, 3, block)
            check_stream(queues)


FAULTS = [
    "delay:5@0.05,reorder@0.5,duplicate-cqe@0.3,unknown-cid@0.3,torn-cqe@0.1,stale-phase@0.1",
    "drop#5",
    "cq-stall#4",
    "cfs#20",
    "error:0x004#3,error:0x082#9",
]


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("placement", ON_GPU)
def test_faults_are_borne_or_repaired(controller: Any, placement: str, fault: str) -> None:
    """After a reset, queues in GPU memory are zeroed and made anew, too."""
    with controller.namespace().gpu_queues(0, count=2, depth=16, placement=placement, timeout=0.3) as queues:
        inject(controller, fault)
        check_gather(queues, rows=few(1000, 200))
        check_stream(queues)
        assert sum(count for name, count in stats(controller).items() if name.startswith("fault.")) > 0
        if "drop" in fault or "stall" in fault:
            assert queues.recoveries > 0
        if "cfs" in fault:
            assert controller.resets > 0
        inject(controller, "")
        controller.reset()
        check_gather(queues)


@pytest.mark.parametrize("placement", ON_GPU)
def test_a_controller_that_is_gone_frees_everything_in_the_end(controller: Any, placement: str) -> None:
    queues = controller.namespace().gpu_queues(0, count=2, depth=16, placement=placement, timeout=0.3)
    inject(controller, "device-gone#10")
    with pytest.raises(gpunvme.NvmeError):
        queues.gather(some_lbas(queues.namespace, 300, 1), Buffer.empty(300 * BLOCK, GPU))
    controller.close()
    with nvme.open(URI) as again, again.namespace().gpu_queues(0, count=1, placement=placement) as queues:
        queues.gather([0], Buffer.empty(BLOCK, GPU))


TOUCHING = """
extern "C" __global__ void run(const GpuQueue* queues, unsigned count, unsigned char* out, unsigned* fates) {
  const unsigned thread = blockIdx.x * blockDim.x + threadIdx.x;
  const Outcome outcome = read(queues[thread % count], thread, 1, out + thread * 512);
  fates[thread] = static_cast<unsigned>(outcome.fate) << 16 | outcome.status;
}
"""


@pytest.mark.parametrize("placement", ON_GPU)
def test_kernels_of_ones_own_notice_nothing(controller: Any, placement: str) -> None:
    # Most threads wait for a slot: they have as long as a command has.
    with controller.namespace().gpu_queues(0, count=3, depth=16, placement=placement, timeout=30) as queues:
        out, fates = Buffer.empty(256 * BLOCK, GPU), Buffer.empty(256 * 4, GPU)
        kernel = gpunvme.gpu.compile(PRELUDE + TOUCHING).kernel("run")
        kernel.launch(2, 128, queues, queues.count, out, fates, stream=0)
        # A copy that is enqueued behind the kernel may hold up the copies that the kernel waits for.
        Gpu(0).synchronize(0)
        assert not fates.numpy().view(np.uint32).any(), fates.numpy().view(np.uint32)
        assert out.numpy().tobytes() == DATA[: 256 * BLOCK]


HANGING = """
import sys
import gpunvme
from gpunvme import nvme
from gpunvme.gpu.driver import Gpu
controller = nvme.open("soft:ram?size=1MiB&queues=8", queues=2)
queues = controller.namespace().gpu_queues(0, count=2, depth=16, placement=sys.argv[2])
kernel = gpunvme.gpu.compile(sys.argv[1]).kernel("run")
host, device = Gpu(0).allocate_host(4096)
kernel.launch(1, 32, queues, device, stream=0)
try:
    queues.close(timeout=0.3)
except gpunvme.DeadlineExceeded as error:
    assert "still runs" in str(error), error
else:
    sys.exit("close() did not say that a kernel hangs")
controller.close()
print("closed", flush=True)
ctypes.c_uint32.from_address(host).value = 1
"""


@pytest.mark.slow
def test_a_kernel_that_hangs_keeps_its_memory() -> None:
    child = subprocess.run(
        [sys.executable, "-c", CHILD + HANGING, PRELUDE + HUNG, "full"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert child.stdout == "closed\n", child.stderr


# --- the probe


def test_an_emulated_placement_is_used_only_when_asked_for(controller: Any) -> None:
    with controller.namespace().gpu_queues(0, count=1) as queues:
        assert queues.placement == "host"
        for higher in ON_GPU:
            assert "only when asked for by name" in queues.reasons[higher]
            assert "never speed" in queues.reasons[higher]


@pytest.mark.parametrize("placement", ON_GPU)
def test_a_server_in_another_process_reaches_no_gpu_memory(tmp_path: Path, placement: str) -> None:
    with served(tmp_path / "socket") as uri, nvme.open(uri, queues=2) as opened:
        with pytest.raises(gpunvme.PathError, match=f"{placement}.*shared with it by descriptor"):
            opened.namespace().gpu_queues(0, count=1, placement=placement)
        with opened.namespace().gpu_queues(0, count=1) as queues:
            assert queues.placement == "host"
            assert "by descriptor" in queues.reasons["full"]


class Drive(SoftTransport):
    """As a kernel module would map GPU memory for a drive: not as an emulation, in several ranges of IOVAs."""

    gpu_access = GpuAccess("direct", "mapped by a kernel module")

    def __init__(self) -> None:
        super().__init__(parse_uri(URI + "&mqes=4096"))
        self.mapped: list[int] = []  # bytes, of each time
        self.refuses = -1  # which of them is refused
        self.mixes_up = False

    def map_gpu(self, address: int, nbytes: int, device: int, writable: bool = True) -> GpuDmaMemory:
        if len(self.mapped) == self.refuses:
            self.mapped.append(0)
            raise gpunvme.TransportError("the module has no room left")
        self.mapped.append(nbytes)
        starts = list(range(address, address + nbytes, GPU_PAGE))
        # Not in order, so that no two pages of 64 KiB have IOVAs that follow each other.
        order = starts[::2] + starts[1::2]
        parts = {start: SoftTransport.map_gpu(self, start, GPU_PAGE, device, writable) for start in reversed(order)}
        if self.mixes_up and len(starts) > 1:
            parts[starts[0]], parts[starts[1]] = parts[starts[1]], parts[starts[0]]
        each = np.arange(0, GPU_PAGE, 4096, dtype=np.uint64)
        iovas = np.concatenate([np.uint64(parts[start].iova()) + each for start in starts])

        def release() -> None:
            for part in parts.values():
                part.close()

        return GpuDmaMemory(address, nbytes, device, iovas, release)


@pytest.fixture
def drive() -> Iterator[Any]:
    with nvme.Controller(Drive(), queues=2, timeout=0.5) as opened:
        opened.namespace().write_from(DATA)
        yield opened


def test_the_highest_placement_that_works_is_used(drive: Any) -> None:
    with drive.namespace().gpu_queues(0, count=2, depth=64, slot_bytes=16384) as queues:
        assert queues.placement == "full"
        assert "compared" in queues.reasons["full"]
        assert queues.reasons["data"] == queues.reasons["host"] == "not needed: 'full' works"
        assert "emulated" not in check_gather(queues, rows=100, blocks=40).reason
        check_stream(queues)
        drive.reset()
        check_gather(queues)


def test_queues_that_one_range_of_iovas_does_not_hold_stay_with_the_host(drive: Any) -> None:
    with drive.namespace().gpu_queues(0, count=2, depth=2000) as queues:
        assert queues.placement == "data"
        assert "range of IOVAs" in queues.reasons["full"]
        check_stream(queues)
    with pytest.raises(gpunvme.PathError, match=r"(?s)'full' cannot be used.*range of IOVAs.*depth="):
        drive.namespace().gpu_queues(0, count=1, depth=2000, placement="full")


def live() -> dict[str, int]:
    """What the driver has given out and not got back."""
    gc.collect()
    return fake.counters().live() if EMULATED else {}


def test_what_cannot_be_mapped_is_given_up_without_a_trace(drive: Any) -> None:
    namespace, transport = drive.namespace(), drive.transport
    with namespace.gpu_queues(0, count=2, depth=16, slot_bytes=16384):
        maps = len(transport.mapped)  # for "full"
    before = live()
    for refused in range(maps):
        transport.mapped, transport.refuses = [], refused
        with namespace.gpu_queues(0, count=2, depth=16, slot_bytes=16384) as queues:
            # The refused one was for "full"; nothing is refused the second time.
            assert queues.placement == "data", queues.reasons
            assert "no room left" in queues.reasons["full"]
            check_gather(queues, rows=20)
        assert live() == before
        transport.mapped, transport.refuses = [], refused
        with pytest.raises(gpunvme.PathError, match="no room left"):
            namespace.gpu_queues(0, count=2, depth=16, slot_bytes=16384, placement="full")
        assert live() == before
    ids = drive.take_queue_ids(100)
    assert len(ids) == 10
    drive.give_queue_ids(ids)


def test_a_placement_that_brings_other_bytes_is_not_used(drive: Any) -> None:
    """As where a bridge sends a drive's writes elsewhere."""
    drive.namespace().gpu_queues(0, count=1, depth=64).close()
    before = live()
    drive.transport.mixes_up = True
    with drive.namespace().gpu_queues(0, count=1, depth=64) as queues:
        assert queues.placement == "host"
        for higher in ON_GPU:
            assert "other bytes" in queues.reasons[higher] or "never answered" in queues.reasons[higher]
        check_gather(queues)
    assert live() == before
    assert stats(drive)["dma_faults"] == 0


def test_a_placement_whose_commands_are_never_answered_is_not_used(drive: Any, monkeypatch: Any) -> None:
    verify, tried = Moves.rows, []

    def rows(self: Moves, *arguments: Any) -> Any:
        tried.append(self._set.placement)
        inject(drive, "drop" if len(tried) == 1 else "")
        try:
            return verify(self, *arguments)
        finally:
            inject(drive, "")

    monkeypatch.setattr(Moves, "rows", rows)
    with drive.namespace().gpu_queues(0, count=1, depth=4, timeout=0.1) as queues:
        assert tried == ["full", "data"]
        assert queues.placement == "data"
        assert "never answered" in queues.reasons["full"]
        check_gather(queues)


@pytest.mark.parametrize(("ordering", "placement"), [(0, "host"), (100, "full"), (200, "full")])
def test_writes_that_are_not_ordered_are_not_relied_on(
    drive: Any, monkeypatch: Any, ordering: int, placement: str
) -> None:
    monkeypatch.setattr(Gpu, "writes_ordering", lambda _: ordering)
    with drive.namespace().gpu_queues(0, count=1, depth=16) as queues:
        assert queues.placement == placement
        if placement == "host":
            assert "WRITES_ORDERING" in queues.reasons["full"]
            assert "WRITES_ORDERING" in queues.reasons["data"]
    if placement == "host":
        with pytest.raises(gpunvme.PathError, match="WRITES_ORDERING"):
            drive.namespace().gpu_queues(0, count=1, placement="data")


def test_pages_larger_than_the_gpus_are_a_reason() -> None:
    refusal = pytest.raises(gpunvme.PathError, match="131072 bytes are larger")
    with nvme.open(URI + "&mpsmin=5&mpsmax=5", queues=2) as opened, refusal:
        opened.namespace().gpu_queues(0, count=1, placement="data")


# --- on the emulated GPU alone


@pytest.mark.skipif(not EMULATED, reason="fails calls of the driver")
@pytest.mark.parametrize("placement", ON_GPU)
def test_a_copy_that_fails_is_tried_again_and_recorded(controller: Any, placement: str) -> None:
    with controller.namespace().gpu_queues(0, count=1, depth=8, placement=placement, timeout=1.0) as queues:
        # One after the other: what a copy that failed makes necessary copies, too, and must not fail.
        for k in (3, 8, 20):
            fake.fail_call("cuMemcpyHtoDAsync", 700, k)
            check_gather(queues, rows=60)
            check_stream(queues)
        assert stats(controller)["device_copy_errors"] > 0
        assert controller.transport.controller.dma_faults()
        assert "cuMemcpyHtoDAsync" in controller.transport.controller.gpu_failure(0)
        fake.reset()


@pytest.mark.skipif(not EMULATED, reason="there may be one GPU")
@pytest.mark.parametrize("placement", ON_GPU)
def test_the_other_gpu_and_both_at_once(controller: Any, placement: str) -> None:
    before = live()
    namespace = controller.namespace()
    with (
        namespace.gpu_queues(0, count=1, depth=8, placement=placement) as one,
        namespace.gpu_queues(1, count=1, depth=8, placement=placement) as other,
    ):
        outs = [Buffer.empty(64 * BLOCK, each.device) for each in (one, other)]
        threads = [
            threading.Thread(target=each.gather, args=(np.arange(64), out))
            for each, out in zip((one, other), outs, strict=True)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        for out in outs:
            assert out.numpy().tobytes() == DATA[: 64 * BLOCK]
        del outs, out
    after = live()
    # The controller keeps what it copies with, one stream and one buffer a GPU, until it is closed.
    assert after["live_allocations"] == before["live_allocations"]
    assert after["live_host_registrations"] == before["live_host_registrations"]
    assert after["live_streams"] - before["live_streams"] == 2
    controller.close()
    assert live() == before


@pytest.mark.skipif(not EMULATED, reason="counts what the driver has given out")
@pytest.mark.parametrize("placement", EVERYWHERE)
def test_nothing_is_left(placement: str) -> None:
    def use(fault: str) -> None:
        with nvme.open(URI, queues=2, timeout=0.3) as opened:
            opened.namespace().write_from(DATA)
            queues = opened.namespace().gpu_queues(0, count=2, depth=8, placement=placement, timeout=0.3)
            inject(opened, fault)
            lbas = np.arange(100)
            if fault == "device-gone#10":
                with pytest.raises(gpunvme.NvmeError):
                    queues.gather(lbas, Buffer.empty(100 * BLOCK, GPU))
            else:
                queues.gather(lbas, Buffer.empty(100 * BLOCK, GPU))
                opened.reset()
                queues.gather(lbas, Buffer.empty(100 * BLOCK, GPU))
            if fault:
                queues.close()

    use("")
    before = live()
    for fault in ("", "drop#3", "device-gone#10"):
        use(fault)
        assert live() == before, fault


def test_gpu_memory_is_mapped_in_whole_pages_and_cannot_be_looked_at(controller: Any) -> None:
    transport = controller.transport
    gpu = Gpu(0)
    allocated = gpu.allocate(3 * GPU_PAGE)
    start = -(-allocated // GPU_PAGE) * GPU_PAGE
    for address, nbytes in ((start + 4096, GPU_PAGE), (start, 4096), (start, 0)):
        with pytest.raises(ValueError, match="whole pages"):
            transport.map_gpu(address, nbytes, 0)
    memory = transport.map_gpu(start, GPU_PAGE, 0)
    assert memory.iova() % GPU_PAGE == 0
    with pytest.raises(TypeError, match="cuda:0"):
        memory.view()
    with pytest.raises(gpunvme.CudaError):
        transport.map_gpu(start, GPU_PAGE, 99)
    memory.close()
    memory.close()
    assert transport.map_gpu(start, GPU_PAGE, 0).iova() == memory.iova()  # its IOVAs were given back
