"""Two GPUs in one process, one after the other and at the same time.

On two real GPUs with ``-m gpu``; on the emulated ones, smaller, by tests/soft/test_emulated_gpu_queues.py. If this
failed, who has several GPUs would get errors of CUDA, bytes on the wrong GPU, or transfers that wait for ever.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gpu_queue_machine import (
    BLOCK,
    CHILD,
    EMULATED,
    MARKS,
    PRELUDE,
    SIZE,
    Int64s,
    Machine,
    allocations_wait_for_kernels,
    few,
    rows_of,
    some_lbas,
)

import files
import gpunvme
from gpunvme import _native
from gpunvme.c_library import c_library
from gpunvme.doctor import checks_gpu, measure
from gpunvme.doctor.system import System
from gpunvme.gpu import CachedArray, GpuQueues
from gpunvme.gpu.driver import Gpu, libcuda
from gpunvme.memory import Buffer

pytestmark = MARKS
GPUS = ("cuda:0", "cuda:1")
FILE_BYTES = few(48 << 20, 5 << 20) + 1234
_C_EINVAL = -1  # GPUNVME_EINVAL
_SECONDS = 120  # after which a thread is taken to hang


@pytest.fixture(scope="module", autouse=True)
def _two_gpus() -> None:
    found = 0 if _native.cuda_unavailable_reason() else len(_native.cuda_devices())
    if found < len(GPUS):
        pytest.skip(f"needs two GPUs; CUDA shows {found}")


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("several") / "file"
    files.make(where, FILE_BYTES)
    return where


@pytest.fixture(scope="module")
def data(path: Path) -> bytes:
    return path.read_bytes()


@pytest.fixture
def file(path: Path) -> Iterator[gpunvme.File]:
    with gpunvme.open(path) as opened:
        yield opened


@pytest.fixture
def machine(stored: bytes) -> Iterator[Machine]:
    """A controller whose queues are driven by the second GPU."""
    allocations_wait_for_kernels()
    made = Machine(stored, device=1)
    with made.controller:
        yield made


def at_once(*work: Callable[[], None]) -> None:
    """Call all of them at the same time, in threads."""
    failures: list[BaseException] = []
    begin = threading.Barrier(len(work))

    def run(one: Callable[[], None]) -> None:
        try:
            begin.wait(_SECONDS)
            one()
        except BaseException as failure:  # noqa: BLE001 - told to whoever waits
            failures.append(failure)

    threads = [threading.Thread(target=run, args=(one,), daemon=True) for one in work]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(_SECONDS)
        assert not thread.is_alive(), "a thread hangs"
    if failures:
        raise failures[0]


def on(gpu: str, content: bytes) -> Buffer:
    """A copy of bytes on a GPU."""
    buffer, host = Buffer.empty(len(content), gpu), np.frombuffer(content, np.uint8)
    _native.gpu_copy(buffer.span.device.index, buffer.ptr, host.ctypes.data, len(content), True)
    return buffer


# --- files


def test_a_file_to_each_gpu_in_turn(data: bytes, file: gpunvme.File) -> None:
    for gpu in (*GPUS, *GPUS):
        buffer = file.read(5, FILE_BYTES - 9, gpu)
        assert buffer.device == gpu
        assert _native.cuda_device_of(buffer.ptr) == int(gpu[-1])
        assert buffer.numpy().tobytes() == data[5 : FILE_BYTES - 4]


def test_a_file_to_both_gpus_at_once(path: Path, data: bytes) -> None:
    allocations_wait_for_kernels()

    def read(gpu: str, seed: int) -> None:
        random = np.random.default_rng(seed)
        with gpunvme.open(path) as opened:
            for _ in range(few(6, 3)):
                offset = int(random.integers(0, FILE_BYTES // 2))
                nbytes = int(random.integers(1, FILE_BYTES // 2))
                assert opened.read(offset, nbytes, gpu).numpy().tobytes() == data[offset : offset + nbytes]

    at_once(*(lambda gpu=gpu, seed=seed: read(gpu, seed) for seed, gpu in enumerate(GPUS * 2)))


def test_transfers_that_nobody_waits_for_on_both(data: bytes, file: gpunvme.File, tmp_path: Path) -> None:
    buffers = [Buffer.empty(FILE_BYTES, gpu) for gpu in GPUS * 2]
    for transfer in [file.read_into(buffer, wait=False) for buffer in buffers]:
        transfer.wait(_SECONDS)
    assert all(buffer.numpy().tobytes() == data for buffer in buffers)
    targets = [gpunvme.open(tmp_path / str(number), "w") for number in range(4)]
    for transfer in [target.write_from(each, wait=False) for target, each in zip(targets, buffers, strict=True)]:
        transfer.wait(_SECONDS)
    for number, target in enumerate(targets):
        target.close()
        assert (tmp_path / str(number)).read_bytes() == data


def test_gather_and_write(data: bytes, file: gpunvme.File, tmp_path: Path) -> None:
    offsets = np.random.default_rng(1).integers(0, FILE_BYTES - 700, 300)
    for gpu in reversed(GPUS):
        rows = file.gather(offsets, 700, device=gpu)
        assert rows.device == gpu
        assert rows.numpy().tobytes() == b"".join(data[at : at + 700] for at in offsets)
        with gpunvme.open(tmp_path / gpu, "w") as target:
            target.write_from(rows)
        assert (tmp_path / gpu).read_bytes() == rows.numpy().tobytes()


def test_the_threads_own_context_stays_current(data: bytes, file: gpunvme.File) -> None:
    """Else what a framework does next would happen on another GPU."""
    now, after = ctypes.c_uint64(), ctypes.c_uint64()
    with Gpu(0).current():
        libcuda()["cuCtxGetCurrent"](ctypes.byref(now))
        buffer = file.read(0, 100_000, "cuda:1")
        assert buffer.numpy().tobytes() == data[:100_000]
        file.gather([1, 2], 500, device="cuda:1")
        del buffer
        libcuda()["cuCtxGetCurrent"](ctypes.byref(after))
    assert now.value == after.value != 0


BUSY = """
import ctypes, sys
import gpunvme
from gpunvme import nvme
from gpunvme.gpu.driver import Gpu
from gpunvme.memory import Buffer

path = sys.argv[1]
with open(path, "rb") as opened:
    data = opened.read()
nbytes = len(data)
first = Gpu(0)
kernel = gpunvme.gpu.compile('''
extern "C" __global__ void spin(volatile unsigned* go_on) { while (*go_on == 0) __nanosleep(1000); }
''', device=0).kernel("spin")
stream, (flag, flag_on_gpu) = first.stream(), first.allocate_host(4096)
with gpunvme.open(path, path="host") as file, nvme.open(f"soft:ram?size={nbytes}") as controller:
    namespace = controller.namespace()
    namespace.write_from(data)
    buffers = [Buffer.empty(nbytes, device) for device in (0, 1, 0, 1)]
    # All that is made once is made before the kernel runs.
    file.read_into(buffers[0]); file.read_into(buffers[1])
    namespace.read_into(buffers[2]); namespace.read_into(buffers[3])
    for each in buffers: each.numpy()
    kernel.launch(1, 1, flag_on_gpu, stream=stream)
    try:
        behind = [file.read_into(buffers[0], stream=stream, wait=False)]
        behind.append(namespace.read_into(buffers[2], stream=stream, wait=False))
        for source, buffer in ((file, buffers[1]), (namespace, buffers[3])):
            for _ in range(3):
                source.read_into(buffer, wait=False).wait(60)
        assert not any(each.done for each in behind)
    finally:
        ctypes.c_uint32.from_address(flag).value = 1
    for each in behind: each.wait(60)
    for buffer in buffers: assert buffer.numpy().tobytes() == data
first.free_host(flag)
print("well")
"""


def test_a_gpu_that_waits_holds_up_no_transfer_of_the_other(tmp_path: Path) -> None:
    """What it waits for may be the other one: a layer there, a collective."""
    files.make(tmp_path / "file", 20 << 20)  # more than what bytes pass through, of a worker and of a controller
    said = files.output(CHILD + BUSY, tmp_path / "file", env={"GPUNVME_WORKERS": "1"}, timeout=200)
    assert said == "well\n"


def test_the_c_library(path: Path, data: bytes) -> None:
    library = ctypes.CDLL(str(c_library().file))
    source, timeout = ctypes.c_uint64(), ctypes.c_int64(60_000)
    assert library.gpunvme_init(1) == 0
    try:
        assert library.gpunvme_open(os.fsencode(path), 0, ctypes.byref(source)) == 0
        buffers = [Buffer.empty(100_000, gpu) for gpu in GPUS]
        for device in (1, 0, 1):
            where = ctypes.c_void_p(buffers[device].ptr)
            arguments = source, ctypes.c_int64(7), ctypes.c_uint64(100_000), where
            assert library.gpunvme_read(*arguments, device, None, timeout, None) == 0
            assert buffers[device].numpy().tobytes() == data[7:100_007]
            assert library.gpunvme_read(*arguments, 1 - device, None, timeout, None) == _C_EINVAL
        assert library.gpunvme_close(source) == 0
    finally:
        library.gpunvme_shutdown()


def test_what_is_said_of_the_second_gpu(file: gpunvme.File) -> None:
    explained = file.explain("cuda:1")
    assert explained.device == "cuda:1"
    assert any(verdict.path == "host" and verdict.usable for verdict in explained.verdicts)
    (finding,) = checks_gpu.check_cuda(System())
    for number, described in enumerate(_native.cuda_devices()):
        assert f"cuda:{number} {described['name']} ({described['pci_bus_id'].lower()})" in finding.fact
    if not EMULATED:
        assert "cuda:1: host to GPU" in measure.probe_copies(Gpu(1), "cuda:1").fact
    with pytest.raises(gpunvme.CudaError, match="cuda:99"):
        file.read(0, 100, "cuda:99")


# --- namespaces and queues


def test_a_namespace_and_both_gpus(machine: Machine, stored: bytes) -> None:
    namespace = machine.namespace
    lbas = some_lbas(namespace, 100, 2)

    def move(gpu: str) -> None:
        for _ in range(2):
            assert namespace.read(0, namespace.blocks, gpu).numpy().tobytes() == stored
            rows = namespace.gather(lbas, 2, device=gpu)
            assert rows.numpy().tobytes() == rows_of(stored, lbas, 2)

    at_once(*(lambda gpu=gpu: move(gpu) for gpu in GPUS * 2))


def test_files_on_a_namespace_by_kernels_of_both(machine: Machine, stored: bytes) -> None:
    """The path keeps queues of its own for each GPU, and takes not all there are for the first one."""
    with gpunvme.open(machine.namespace, path="gpu-nvme") as opened:
        for gpu in (*reversed(GPUS), *GPUS):
            assert opened.read(3, 70_000, gpu).numpy().tobytes() == stored[3:70_003]
            done = opened.last_transfer
            assert done is not None
            assert (done.path, f"kernels on {gpu} " in done.reason) == ("gpu-nvme", True)


READ_ONE = """
extern "C" __global__ void read_one(const GpuQueue* queues, unsigned long long lba, unsigned char* out,
                                    unsigned long long* fate) {
  const Outcome outcome = warp_read(queues[0], lba, 1, out);
  if (threadIdx.x == 0) *fate = static_cast<unsigned long long>(outcome.fate) << 32 | outcome.status;
}
"""


def read_one(queues: GpuQueues, lba: int, gpu: str) -> bytes:
    """A block, read by a kernel of a user's own."""
    out, fate = Buffer.empty(BLOCK, gpu), Buffer.empty(8, gpu)
    program = gpunvme.gpu.compile(PRELUDE + READ_ONE, device=gpu)
    program.kernel("read_one").launch(1, 32, queues, lba, out, fate, stream=0)
    queues.gpu.synchronize(0)
    assert not fate.numpy().any()
    return out.numpy().tobytes()


def test_queues_of_the_second_gpu(machine: Machine, stored: bytes) -> None:
    queues, namespace = machine.queues, machine.namespace
    lbas = some_lbas(namespace, few(2000, 150), 3)
    out = Buffer.empty(len(lbas) * 3 * BLOCK, "cuda:1")
    done = queues.gather(lbas, out)
    assert "kernels on cuda:1" in done.reason
    assert out.numpy().tobytes() == rows_of(stored, lbas, 3)
    out = Buffer.empty(len(lbas) * 3 * BLOCK, "cuda:1")
    queues.gather(Int64s(on("cuda:1", lbas.astype(np.int64).tobytes())), out, wait=False).wait(_SECONDS)
    assert out.numpy().tobytes() == rows_of(stored, lbas, 3)
    whole = Buffer.empty(SIZE, "cuda:1")
    queues.stream(0, SIZE, whole)
    assert whole.numpy().tobytes() == stored
    assert read_one(queues, 77, "cuda:1") == rows_of(stored, [77], 1)
    new = files.contents(50 * BLOCK, 9)
    queues.scatter(np.arange(50) * 5, on("cuda:1", new))
    assert b"".join(namespace.read(5 * at, 1).numpy().tobytes() for at in range(50)) == new


def test_both_gpus_drive_queues_of_one_controller_at_once(machine: Machine, stored: bytes) -> None:
    """The controller's doorbells lie in one page, which the driver lets a process register once."""
    namespace = machine.namespace
    first = namespace.gpu_queues(0, count=2, depth=64, placement=machine.queues.placement)
    assert first.doorbell == machine.queues.doorbell, first.doorbell_reason
    pairs = [(machine.queues, "cuda:1"), (first, "cuda:0")]

    def gather(queues: GpuQueues, gpu: str, seed: int) -> None:
        for number in range(few(20, 2)):
            lbas = some_lbas(namespace, few(1000, 60), 4, 100 * seed + number)
            out = Buffer.empty(len(lbas) * 4 * BLOCK, gpu)
            queues.gather(lbas, out)
            assert out.numpy().tobytes() == rows_of(stored, lbas, 4)

    at_once(*(lambda pair=pair, seed=seed: gather(*pair, seed) for seed, pair in enumerate(pairs * 2)))
    machine.queues.close()  # whichever GPU registered the page
    gather(first, "cuda:0", 7)
    again = namespace.gpu_queues(1, count=1, depth=64)
    first.close()
    gather(again, "cuda:1", 8)


class Stream:
    """A stream that tells its GPU, as CuPy's do."""

    def __init__(self, index: int) -> None:
        self.device_id, self.ptr = index, Gpu(index).stream()


def test_what_is_on_the_other_gpu_is_refused_before_anything_runs(machine: Machine, file: gpunvme.File) -> None:
    queues, lbas = machine.queues, np.arange(8)
    here, there = Buffer.empty(8 * BLOCK, "cuda:1"), Buffer.empty(8 * BLOCK, "cuda:0")
    lbas_there = Int64s(on("cuda:0", lbas.astype(np.int64).tobytes()))
    kernel = gpunvme.gpu.compile(PRELUDE + READ_ONE, device=1).kernel("read_one")
    on_first = gpunvme.gpu.compile(PRELUDE + READ_ONE, device=0).kernel("read_one")
    array = queues.cached_array(np.uint64, capacity_bytes=1 << 20)
    stream = Stream(0)
    before = machine.controller.transport.controller.stats()["commands"]
    moves: list[tuple[Callable[[], Any], str]] = [
        (lambda: queues.gather(lbas, there), "memory is on cuda:0; these queues are driven by cuda:1"),
        (lambda: queues.gather(lbas_there, here), "memory is on cuda:0; these queues are driven by cuda:1"),
        (lambda: queues.scatter(lbas, there), "memory is on cuda:0; these queues are driven by cuda:1"),
        (lambda: queues.stream(0, here.nbytes, there), "memory is on cuda:0; these queues are driven by cuda:1"),
        (lambda: queues.gather(lbas, here, stream=stream), "the stream is on cuda:0, the memory on cuda:1"),
        (lambda: queues.gather(lbas, here, stream=stream.ptr), f"stream {stream.ptr:#x} is not one of cuda:1"),
        (lambda: array.gather([0, 1], there), "memory is on cuda:0; this array is cached on cuda:1"),
        (lambda: array.gather([0, 1], here, stream=stream.ptr), f"stream {stream.ptr:#x} is not one of cuda:1"),
        (lambda: CachedArray.open(queues, np.uint64, 0), "the queues are driven by cuda:1, not by cuda:0"),
        (lambda: kernel.launch(1, 32, queues, 0, there, here), "Buffer is on cuda:0; the kernel was loaded on cuda:1"),
        (lambda: on_first.launch(1, 32, queues, 0, there, there), "GpuQueues is on cuda:1; the kernel was loaded on"),
        (lambda: on_first.launch(1, 32, array, 0, there, there), "CachedArray is on cuda:1; the kernel was loaded on"),
        (lambda: file.read_into(here, stream=stream), "the stream is on cuda:0, the memory on cuda:1"),
        (lambda: machine.namespace.read_into(here, stream=stream), "the stream is on cuda:0, the memory on cuda:1"),
    ]
    for move, said in moves:
        with pytest.raises(gpunvme.SpanError, match=said):
            move()
    large = Buffer.empty(4 << 20, "cuda:1")
    for source in (file, machine.namespace):
        with pytest.raises(gpunvme.CudaError, match="INVALID_HANDLE"):
            source.read_into(large, stream=stream.ptr)
    assert machine.controller.transport.controller.stats()["commands"] == before
    Gpu(0).destroy(stream=stream.ptr)
    queues.gather(lbas, here)  # and everything works as before
    assert here.numpy().tobytes() == machine.namespace.read(0, 8).numpy().tobytes()


def test_a_cached_array_on_the_second_gpu(machine: Machine, stored: bytes) -> None:
    words = np.frombuffer(stored, np.uint64)
    indices = np.random.default_rng(2).integers(0, len(words), few(5000, 200))
    sources: list[tuple[Any, str | None, str]] = [
        (machine.queues, None, "cuda:1"),
        (machine.queues, "cuda:1", "cuda:1"),
        (machine.namespace, "cuda:1", "cuda:1"),
        (machine.namespace, None, "cuda:0"),
    ]
    for source, device, gpu in sources:
        with CachedArray.open(source, np.uint64, device, capacity_bytes=1 << 20) as array:
            assert str(array.device) == gpu
            out = Buffer.empty(8 * len(indices), gpu)
            for _ in range(2):
                array.gather(indices, out)
                assert (out.numpy().view(np.uint64) == words[indices]).all()
            assert array.stats()["hits"] > 0


# --- models


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    random = np.random.default_rng(4)
    wanted = {
        f"model.layers.{number}.{name}.weight": random.integers(0, 255, few(300_000, 20_000) + number, np.uint8)
        for number in range(6)
        for name in ("up", "down")
    }
    where = tmp_path_factory.mktemp("several") / "model.safetensors"
    gpunvme.save_file(wanted, where)
    return where, wanted


def test_layers_on_both_gpus_at_once(model: tuple[Path, dict[str, Any]]) -> None:
    allocations_wait_for_kernels()
    path, wanted = model

    def load(gpu: str) -> None:
        budgets = {"budget_gpu": few(2_000_000, 140_000), "budget_host": 1 << 20}
        with gpunvme.LayerLoader(path, gpu, framework="buffer", **budgets) as loader:
            for _ in range(2):
                found = {}
                for layer in loader:
                    for name, tensor in layer.tensors.items():
                        assert tensor.device == gpu
                        found[name] = tensor.numpy().tobytes()
                assert found == {name: array.tobytes() for name, array in wanted.items()}

    at_once(*(lambda gpu=gpu: load(gpu) for gpu in GPUS))
