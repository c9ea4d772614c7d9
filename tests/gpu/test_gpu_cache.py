"""Arrays on a drive that GPU kernels index, with a cache in GPU memory, against the software controller and its faults.

On a real GPU with ``-m gpu``; on the emulated one by tests/soft/test_emulated_gpu_queues.py. If this failed, kernels
would compute with bytes of other lines, read what they have again and again, or hang.
"""

from __future__ import annotations

import contextlib
import runpy
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gpu_queue_machine import EMULATED, GPU, Int64s, few, on_gpu

import gpunvme
from gpunvme import nvme
from gpunvme.gpu import CachedArray
from gpunvme.memory import Buffer

if not EMULATED:
    pytestmark = pytest.mark.gpu

BLOCK = 512
SIZE = 2 << 20
LINE = 4096
WORDS = np.arange(SIZE // 8, dtype=np.uint64) * np.uint64(0x1_0000_0001)  # each names itself


class Machine:
    """A controller whose blocks hold `WORDS`, its namespace, and GPU queues."""

    def __init__(self, options: str = "", **queues: Any) -> None:
        uri = f"soft:ram?size={SIZE}&threads=2&queues=12{options}"
        self.controller = nvme.open(uri, admin_timeout=5, queues=1, timeout=5)
        self.namespace = self.controller.namespace()
        self.namespace.write_from(WORDS)
        self.queues = self.namespace.gpu_queues(0, **{"count": 2, "depth": 64, **queues})

    def inject(self, faults: str) -> None:
        self.controller.transport.controller.inject(faults, 1)

    def commands(self) -> int:
        return int(self.controller.transport.controller.stats()["commands"])


@contextlib.contextmanager
def machine(options: str = "", **queues: Any) -> Iterator[Machine]:
    made = Machine(options, **queues)
    with made.controller:
        yield made


def gathered(array: CachedArray, indices: Any) -> Any:
    out = Buffer.empty(len(indices) * array.dtype.itemsize, GPU)
    array.gather(indices, out)
    return out.numpy().view(array.dtype)


# --- what comes with the package


@pytest.mark.parametrize("line", [4096, 16384, 65536])
@pytest.mark.parametrize("slot", [None, 65536])
def test_every_element_is_itself_whether_it_was_there_or_not(line: int, slot: int | None) -> None:
    with machine(slot_bytes=slot) as m:
        array = m.queues.cached_array(np.uint64, capacity_bytes=8 * line, line_bytes=line)
        for seed in range(2):
            indices = np.random.default_rng(seed).integers(0, array.size, few(5000, 200))
            assert (gathered(array, indices) == WORDS[indices]).all()
        stats = array.stats()
        assert stats["hits"] + stats["misses"] == 2 * few(5000, 200)
        assert stats["evictions"] == stats["loads"] - 8
        assert stats["failures"] == 0


@pytest.mark.parametrize("dtype", ["u1", "f2", "f4", "u8", "c16", "f4,f4"])
def test_element_types(dtype: str) -> None:
    with machine() as m:
        array = m.queues.cached_array(dtype, lba=3, length=50_000, capacity_bytes=64 * LINE)
        expected = WORDS.view(np.uint8)[3 * BLOCK :].view(np.uint8)
        indices = np.array([0, 1, 2, 777, 49_999, 49_998, 0, 777])
        got = gathered(array, indices)
        each = array.dtype.itemsize
        whole = expected[: 50_000 * each].reshape(-1, each)[indices]
        assert got.tobytes() == whole.tobytes()


def test_what_fits_is_read_once() -> None:
    with machine() as m:
        array = m.queues.cached_array(np.uint64, capacity_bytes=SIZE)
        indices = np.random.default_rng(1).integers(0, 16 * 512, few(20_000, 500))
        for _ in range(2):
            assert (gathered(array, indices) == WORDS[indices]).all()
        stats = array.stats()
        assert stats["loads"] == 16
        assert stats["evictions"] == 0
        assert stats["hits"] >= len(indices)
        array.clear()
        assert sum(array.stats().values()) == 0
        assert (gathered(array, indices) == WORDS[indices]).all()
        assert array.stats()["loads"] == 16


def test_indices_on_the_gpu_are_checked_there() -> None:
    with machine() as m:
        array = m.queues.cached_array(np.uint64, capacity_bytes=64 * LINE)
        out = Buffer.empty(4 * 8, GPU)
        array.gather(Int64s(on_gpu(np.array([5, 6, 7, 8]))), out)
        assert (out.numpy().view(np.uint64) == WORDS[5:9]).all()
        with pytest.raises(gpunvme.RangeError, match=f"element {array.size}"):
            array.gather(Int64s(on_gpu(np.array([5, array.size, 7, 8]))), out)
        array.check()  # it was told
        assert out.numpy().view(np.uint64)[[0, 2, 3]].tolist() == WORDS[[5, 7, 8]].tolist()


def test_pinned_elements_stay() -> None:
    with machine() as m:
        array = m.queues.cached_array(np.uint64, capacity_bytes=3 * 8 * LINE)
        array.pin(0, 21 * 512)  # 7 of 8 lines in each set
        array.pin(0, 21 * 512)
        loads = array.stats()["loads"]
        assert loads == 21
        others = np.random.default_rng(1).integers(21 * 512, array.size, few(2000, 150))
        assert (gathered(array, others) == WORDS[others]).all()
        before = array.stats()
        pinned = np.arange(0, 21 * 512, 97)
        assert (gathered(array, pinned) == WORDS[pinned]).all()
        after = array.stats()
        assert after["loads"] == before["loads"]
        assert after["hits"] == before["hits"] + len(pinned)
        with pytest.raises(ValueError, match="cannot be pinned"):
            array.pin(21 * 512, 1)
        with pytest.raises(ValueError, match="unpin them first"):
            array.clear()
        with pytest.raises(ValueError, match="not pinned together"):
            array.unpin(0, 512)
        array.unpin(0, 21 * 512)
        array.unpin(0, 21 * 512)
        everywhere = np.arange(30 * 512, array.size, 512)
        assert (gathered(array, everywhere) == WORDS[everywhere]).all()
        array.clear()


def test_a_pin_that_fails_pins_nothing() -> None:
    with machine() as m:
        array = m.queues.cached_array(np.uint64, capacity_bytes=8 * LINE)
        m.inject("error:0x281!#3")
        with pytest.raises(gpunvme.CommandError):
            array.pin(0, 7 * 512)
        m.inject("")
        array.clear()
        array.pin(7 * 512, 7 * 512)


def test_nothing_is_allocated_while_a_kernel_of_the_queues_runs() -> None:
    """CUDA may let it wait for the kernel, and what the kernel waits for behind it: the emulated GPU aborts."""
    with machine() as m:
        array = m.queues.cached_array(np.uint64, capacity_bytes=64 * LINE)
        lbas = np.arange(0, 640, 10)
        rows, out = Buffer.empty(len(lbas) * BLOCK, GPU), Buffer.empty(4096 * 8, GPU)
        indices = np.arange(0, array.size, array.size // 4096)
        others: list[CachedArray] = []
        m.inject("slow:30")
        for use in (
            lambda: array.gather(indices[:10], out),
            lambda: array.gather(indices[:4000], out),
            lambda: array.pin(0, 512),
            lambda: array.unpin(0, 512),
            lambda: others.append(m.queues.cached_array(np.uint64, capacity_bytes=64 * LINE)),
        ):
            before = m.commands()
            transfer = m.queues.gather(lbas, rows, wait=False)
            deadline = time.monotonic() + 30
            while m.commands() == before:
                assert time.monotonic() < deadline, "the kernel does not begin"
                time.sleep(0.001)
            use()
            transfer.wait(30)
        assert (out.numpy().view(np.uint64)[:4000] == WORDS[indices[:4000]]).all()
        found = rows.numpy().view(np.uint64).reshape(len(lbas), -1)
        assert (found == WORDS.reshape(-1, BLOCK // 8)[lbas]).all()
        assert others[0].stats()["loads"] == 0


def test_nothing_is_launched_while_memory_is_allocated() -> None:
    with machine() as m:
        first, second = (m.queues.cached_array(np.uint64, capacity_bytes=64 * LINE) for _ in range(2))
        place, out, flags = Int64s(on_gpu(np.array([5]))), Buffer.empty(8, GPU), on_gpu(np.zeros(1, np.uint8))
        m.inject("slow:200")
        uses = [lambda: first.gather(place, out), lambda: second._run_pins("pin", 0, 1, flags.ptr)]
        threads = [threading.Thread(target=use) for use in uses]

        def allocate() -> None:
            for thread in threads:
                thread.start()
            time.sleep(0.1)  # were anything launched now, it would be by then, and still run
            m.queues.gpu.free_host(m.queues.gpu.allocate_host(4096)[0])

        m.queues._moves.while_quiet(allocate)
        for thread in threads:
            thread.join(30)
        assert not any(thread.is_alive() for thread in threads)
        assert out.numpy().view(np.uint64)[0] == WORDS[5]


# --- kernels of one's own

SUMS = """
using namespace gpunvme;
// Some lanes go another way, and all come back to what the first of them has read. A warp holds one line at a time.
extern "C" __global__ void run(const PageCache* cache, const long long* indices, unsigned long long* out,
                               unsigned long long count) {
  const unsigned long long i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= count) return;
  const CachedArray<unsigned long long> array(cache);
  const long long firsts = indices[i - threadIdx.x % 32];
  unsigned long long sum = array[indices[i]];
  if (i % 3 == 0) {
    unsigned long long value = 0;
    if (array.read((indices[i] + 5) % array.size(), value).ok()) sum += value;
  } else if (i % 7 < 4) {
    const Line<unsigned long long> line = array.line(firsts);
    if (line.ok()) sum += line[line.first()] + line[line.end() - 1];
  }
  out[i] = sum + array[firsts];
}
"""


@pytest.mark.parametrize("block", [128, 33])
@pytest.mark.parametrize(("lines", "depth"), [(64, 64), (8, 3)])
def test_diverged_lanes_partial_warps_and_more_threads_than_frames(block: int, lines: int, depth: int) -> None:
    count = few(20_000, 300)
    with machine(depth=depth, timeout=20) as m:
        array = m.queues.cached_array(np.uint64, capacity_bytes=lines * LINE)
        kernel = gpunvme.gpu.compile(array.source() + SUMS).kernel("run")
        indices = np.random.default_rng(3).integers(0, array.size, count)
        out, places = Buffer.empty(8 * count, GPU), on_gpu(indices)
        kernel.launch(-(-count // block), block, array, places, out, count, stream=0)
        got = out.numpy().view(np.uint64)
        array.check()
        numbers = np.arange(count)
        firsts = indices[numbers - numbers % block % 32]
        first = firsts // 512 * 512
        expected = WORDS[indices] + WORDS[firsts]
        expected += np.where(numbers % 3 == 0, WORDS[(indices + 5) % array.size], np.uint64(0))
        held = (numbers % 3 != 0) & (numbers % 7 < 4)
        expected += np.where(held, WORDS[first] + WORDS[first + 511], np.uint64(0))
        assert (got == expected).all()
        stats = array.stats()
        assert stats["hits"] + stats["misses"] == 2 * count + (numbers % 3 == 0).sum() + held.sum()


TILES = """
using namespace gpunvme;
extern "C" __global__ void run(const PageCache* cache, unsigned long long* out, unsigned long long count) {
  const unsigned long long i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= count) return;
  const CachedArray<unsigned> array(cache);
  Line<unsigned> held;
  unsigned long long sum = 0;
  for (unsigned j = 0; j < 64; ++j) {
    unsigned value = 0;
    if (array.read(i * 64 + j, value, held).ok()) sum += value;
  }
  out[i] = sum;
}
"""


NEIGHBOURS = """
using namespace gpunvme;
// Pins are bits 26:3 of a frame's word.
extern "C" __global__ void count_pinned(const unsigned long long* words, unsigned long long frames,
                                        unsigned long long* bad) {
  for (unsigned long long i = 0; i < frames; ++i) {
    if ((words[i] >> 3 & 0xffffff) != 0) ++*bad;
  }
}
// Warps that read neighbours, all of them the same ones, line after line.
extern "C" __global__ void run(const PageCache* cache, unsigned long long* bad, unsigned long long lines,
                               unsigned long long rounds) {
  const CachedArray<unsigned long long> array(cache);
  for (unsigned long long i = 0; i < lines * rounds; ++i) {
    const unsigned long long index = i % lines * 512 + i % 16 * 32 + threadIdx.x % 32;
    if (array[index] != index * 0x100000001ull) atomicAdd(bad, 1ull);
  }
}
"""


def test_a_warp_of_neighbours_looks_once_and_keeps_nothing() -> None:
    with machine(timeout=20) as m:
        program = gpunvme.gpu.compile(CachedArray.source() + NEIGHBOURS)
        kernel, pinned = program.kernel("run"), program.kernel("count_pinned")
        bad = on_gpu(np.zeros(1, np.uint64))
        lines, blocks = 24, few(8, 3)
        # All fits: what was read once is found from then on.
        with m.queues.cached_array(np.uint64, capacity_bytes=64 * LINE) as array:
            missed = []
            for grid, block in ((1, 32), (blocks, 64)):
                kernel.launch(grid, block, array, bad, lines, 4, stream=0)
                assert not bad.numpy().any()
                array.check()
                missed.append(array.stats()["misses"])
                assert array.stats()["loads"] == lines
            assert missed[0] == missed[1] <= lines * 32
        # Nothing fits: lines are asked for while they are on their way, and a pin that was forgotten would keep one.
        m.inject("delay:3")
        with m.queues.cached_array(np.uint64, capacity_bytes=8 * LINE) as array:
            kernel.launch(blocks, 64, array, bad, lines, few(20, 4), stream=0)
            assert not bad.numpy().any()
            array.check()
            assert array.stats()["evictions"] >= lines
            words, nbytes = array._memory._places["words"]
            pinned.launch(1, 1, words, nbytes // 8, bad, stream=0)
            assert not bad.numpy().any()
            assert (gathered(array, np.arange(array.size)[::512]) == WORDS[::512]).all()


def test_a_line_is_held_from_one_read_to_the_next() -> None:
    with machine() as m:
        # Room for all: a warp holds two lines at a time, and who holds one and waits for another may wait in vain.
        array = m.queues.cached_array(np.uint32, capacity_bytes=512 * LINE)
        kernel = gpunvme.gpu.compile(array.source() + TILES).kernel("run")
        count = few(4096, 256)
        out = Buffer.empty(8 * count, GPU)
        kernel.launch(-(-count // 64), 64, array, out, count, stream=0)
        expected = WORDS.view(np.uint32)[: count * 64].reshape(count, 64).sum(1, dtype=np.uint64)
        assert (out.numpy().view(np.uint64) == expected).all()
        array.check()
        assert array.stats()["hits"] + array.stats()["misses"] == count  # each asked once


# --- faults


@pytest.mark.parametrize(
    "fault", ["reorder@0.5", "duplicate-cqe@0.3", "torn-cqe@0.1", "delay:5@0.1", "error:0x004@0.02"]
)
def test_what_must_be_borne_costs_nothing_but_time(fault: str) -> None:
    with machine() as m:
        array = m.queues.cached_array(np.uint64, capacity_bytes=24 * LINE)
        m.inject(fault)
        indices = np.random.default_rng(2).integers(0, array.size, few(5000, 200))
        assert (gathered(array, indices) == WORDS[indices]).all()


def test_a_failed_read_is_an_error_and_never_data() -> None:
    with machine() as m:
        array = m.queues.cached_array(np.uint64, capacity_bytes=24 * LINE)
        m.inject("error:0x281!")
        with pytest.raises(gpunvme.CommandError, match="element 5120 could not be read") as caught:
            gathered(array, [5120])
        (failed,) = caught.value.failures
        assert (failed.sct, failed.sc, failed.lba, failed.blocks) == (2, 0x81, 10 * 8, 8)
        kernel = gpunvme.gpu.compile(array.source() + TILES).kernel("run")
        out = Buffer.empty(8 * 64, GPU)
        kernel.launch(1, 64, array, out, 64, stream=0)
        assert not out.numpy().any()
        array.check()  # the kernel asked for each outcome
        m.inject("")
        assert gathered(array, [5120])[0] == WORDS[5120]
        assert array.stats()["failures"] > 0


def test_a_lost_completion_is_an_error_in_time_and_the_array_goes_on() -> None:
    with machine(timeout=0.3) as m:
        array = m.queues.cached_array(np.uint64, capacity_bytes=24 * LINE)
        m.inject("drop#2")
        indices = np.arange(0, 20 * 512, 512)
        with pytest.raises(gpunvme.CommandError, match="never answered"):
            gathered(array, indices)
        m.inject("")
        m.queues.recover()
        assert (gathered(array, indices) == WORDS[indices]).all()


def test_a_reset_is_survived() -> None:
    with machine() as m:
        array = m.queues.cached_array(np.uint64, capacity_bytes=24 * LINE)
        gathered(array, [1])
        m.controller.reset()
        indices = np.arange(0, array.size, 4096)
        assert (gathered(array, indices) == WORDS[indices]).all()


HOLD = """
using namespace gpunvme;
extern "C" __global__ void run(const PageCache* cache, unsigned long long* out) {
  const CachedArray<unsigned long long> array(cache);
  Line<unsigned long long> lines[8];
  for (unsigned i = 0; i < 8; ++i) lines[i] = array.line(i * 512);
  *out = array[100 * 512];
}
"""


def test_frames_that_are_all_held_are_an_error_and_no_deadlock() -> None:
    with machine(timeout=0.3) as m:
        array = m.queues.cached_array(np.uint64, capacity_bytes=8 * LINE)
        kernel = gpunvme.gpu.compile(array.source() + HOLD).kernel("run")
        out = Buffer.empty(8, GPU)
        kernel.launch(1, 1, array, out, stream=0)
        assert out.numpy().view(np.uint64)[0] == 0
        with pytest.raises(gpunvme.NvmeError, match="all frames of its set"):
            array.check()
        indices = np.arange(0, array.size, 512)  # nothing is held any more
        assert (gathered(array, indices) == WORDS[indices]).all()


# --- files, refusals, endings


def test_a_file(tmp_path: Path) -> None:
    path = tmp_path / "features, 100% & more.bin"
    path.write_bytes(WORDS.tobytes()[: SIZE - BLOCK])
    with CachedArray.open(path, np.float32, GPU, capacity_bytes=1 << 20, line_bytes=16384, threads=2) as array:
        assert len(array) == (SIZE - BLOCK) // 4
        indices = np.array([0, 9, len(array) - 1])
        assert gathered(array, indices).tobytes() == WORDS.view(np.float32)[indices].tobytes()
    with pytest.raises(ValueError, match="closed"):
        array.gather([0], Buffer.empty(4, GPU))
    assert path.read_bytes() == WORDS.tobytes()[: SIZE - BLOCK]
    with pytest.raises(gpunvme.MissingFileError):
        CachedArray.open(tmp_path / "nothing", np.float32, GPU)
    with pytest.raises(TypeError, match="GpuQueues"):
        CachedArray.open(5, np.float32, GPU)


def test_bad_use_is_refused() -> None:
    with machine() as m:
        q = m.queues
        for options, error, match in (
            ({"dtype": "3u1"}, TypeError, "1, 2, 4, 8 or 16 bytes"),
            ({"dtype": object}, TypeError, "1, 2, 4, 8 or 16 bytes"),
            ({"line_bytes": 2048}, ValueError, "power of two"),
            ({"line_bytes": 12288}, ValueError, "power of two"),
            ({"capacity_bytes": 7 * LINE}, ValueError, "at least|at\nleast|least"),
            ({"lba": SIZE // BLOCK}, gpunvme.RangeError, "blocks"),
            ({"length": 0}, gpunvme.RangeError, "length is 0"),
            ({"length": SIZE // 4 + 1}, gpunvme.RangeError, "holds"),
        ):
            with pytest.raises(error, match=match):
                q.cached_array(**{"dtype": np.uint32, **options})
        array = q.cached_array(np.uint32)
        out = Buffer.empty(64, GPU)
        for indices, memory, error in (
            ([array.size], out, gpunvme.RangeError),
            ([-1], out, gpunvme.RangeError),
            (range(17), out, gpunvme.SpanError),
            ([0], bytearray(4), gpunvme.SpanError),
            ([0.5], out, TypeError),
        ):
            with pytest.raises(error):
                array.gather(np.array(indices), memory)
        with pytest.raises(gpunvme.RangeError):
            array.pin(0, array.size + 1)
        assert array.stats()["loads"] == 0


def test_who_is_at_it_while_another_thread_closes_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is launched on memory that is free already."""
    with machine() as m:
        out = Buffer.empty(8, GPU)
        for step, use in (
            ("_index_array", lambda array: array.gather([0], out)),
            ("_lines", lambda array: array.pin(0, 1)),
            ("_lines", lambda array: array.unpin(0, 1)),
        ):
            array = m.queues.cached_array(np.uint64, capacity_bytes=64 * LINE)
            ready = getattr(array, step)

            def and_closed(*arguments: Any, ready: Any = ready, array: CachedArray = array) -> Any:
                result = ready(*arguments)
                closing = threading.Thread(target=array.close)
                closing.start()
                closing.join(60)
                return result

            monkeypatch.setattr(array, step, and_closed)
            with pytest.raises(ValueError, match="closed"):
                use(array)


def test_closing_in_any_order() -> None:
    with machine() as m:
        first, second = (m.queues.cached_array(np.uint64, capacity_bytes=64 * LINE) for _ in range(2))
        second.pin(0, 512)
        assert gathered(first, [3])[0] == WORDS[3]
        first.close()
        first.close()
        with pytest.raises(ValueError, match="closed"):
            first.handle  # noqa: B018 - reading it is what is tried
        assert gathered(second, [3])[0] == WORDS[3]
        m.queues.close()
        for use in (second.stats, second.check, second.clear, lambda: second.handle, lambda: second.pin(0, 1)):
            with pytest.raises(ValueError, match="closed"):
                use()
        second.close()
        assert "closed" in repr(second)


EXAMPLE = Path(__file__).parents[2] / "examples" / "gpu_feature_gather.py"


def test_the_example(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", [str(EXAMPLE), str(few(16_384, 64)), str(few(2_000, 6))])
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    assert "equal: True" in capsys.readouterr().out
