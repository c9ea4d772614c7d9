"""Layers in GPU memory, on the libcuda for tests; test_file_gpu.py runs it in its own process.

What computes are the fake's delayed kernels: a slot that is filled before a kernel has read it changes what the kernel
sees, and a kernel that runs before its layer is there sees what was there before.
"""

from __future__ import annotations

import gc
import os
import signal
import threading
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fake_cuda
import files
import gpunvme
from files import MIB
from gpunvme import _native
from gpunvme.errors import BudgetError, LayerError
from gpunvme.models import layer_ring

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from fake_cuda import FakeCuda, FakeDeviceBuffer

LAYERS, NBYTES = 6, MIB + 777
relaxed = settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow], max_examples=15)


@pytest.fixture
def fake() -> Iterator[FakeCuda]:
    cuda = fake_cuda.use()
    yield cuda
    gc.collect()
    cuda.reset()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    return {f"blk.{number}.w": files.contents(NBYTES + number, seed=number) for number in range(LAYERS)}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory, whole: dict[str, bytes]) -> Path:
    path = tmp_path_factory.mktemp("model") / "model.safetensors"
    gpunvme.save_file({name: np.frombuffer(data, np.uint8) for name, data in whole.items()}, path)
    return path


class Model:
    """Delayed kernels that copy each layer away: what they saw must be the layer."""

    def __init__(self, fake: FakeCuda, whole: dict[str, bytes], stream: int, delay_us: int) -> None:
        self._fake, self._whole, self._stream, self._delay_us = fake, whole, stream, delay_us
        self._seen: list[tuple[str, FakeDeviceBuffer]] = []

    def compute(self, layer: Any, stream: int | None = None) -> None:
        for name, buffer in layer.tensors.items():
            seen = self._fake.alloc(buffer.nbytes)
            on = self._stream if stream is None else stream
            copy = fake_cuda.FakeDeviceBuffer(self._fake, buffer.ptr, buffer.nbytes, 0)
            copy.copy_to(seen, stream=on, delay_us=self._delay_us)
            self._seen.append((name, seen))

    def check(self) -> int:
        self._fake.synchronize(self._stream)
        self._fake.wait_idle()
        count = len(self._seen)
        for name, seen in self._seen:
            assert seen.peek() == self._whole[name], name
            seen.free()
        self._seen.clear()
        return count


def load(path: Path, **options: Any) -> gpunvme.LayerLoader:
    return gpunvme.LayerLoader(path, "cuda:0", framework="buffer", **options)


def one_size(path: Path) -> int:
    with load(path) as loader:
        return max(layer.slot_bytes for layer in loader._layers)


@relaxed
@given(
    slots=st.integers(1, LAYERS + 1),
    gpu=st.integers(0, LAYERS),
    host=st.integers(0, LAYERS),
    delay_us=st.sampled_from([0, 500, 4000]),
    heat=st.sampled_from(["cold", "hot"]),
    order=st.lists(st.just("pass") | st.integers(0, LAYERS - 1), min_size=1, max_size=5),
)
def test_kernels_see_their_layers(
    fake: FakeCuda,
    path: Path,
    whole: dict[str, bytes],
    slots: int,
    gpu: int,
    host: int,
    delay_us: int,
    heat: str,
    order: list[Any],
) -> None:
    """Whatever stays where, whoever is faster, and in whatever order layers are taken."""
    files.heat(path, heat)
    size = one_size(path)
    fake.set_copy_time(jitter_us=300, seed=delay_us)
    stream = fake.create_stream()
    model = Model(fake, whole, stream, delay_us)
    budgets = {"budget_gpu": (min(slots, LAYERS) + gpu) * size, "budget_host": host * size or None}
    with load(path, slots=slots, stream=stream, **budgets) as loader:
        steps = 0
        for step in order:
            for layer in loader if step == "pass" else [loader[step]]:
                model.compute(layer)
                steps += 1
        hits = loader.stats().hits
        assert sum(hits.values()) == steps
        assert not gpu or len(loader._stay) >= min(gpu, LAYERS)
        if host >= LAYERS - gpu:
            assert "source" not in hits
    assert model.check() == steps
    fake.destroy_stream(stream)


@pytest.mark.parametrize("heat", ["hot", "cold"])
@pytest.mark.parametrize("slots", [1, 2, 3])
def test_a_slot_is_not_filled_while_a_kernel_reads_it(
    fake: FakeCuda, path: Path, whole: dict[str, bytes], slots: int, heat: str
) -> None:
    """The consumer is far ahead of its GPU: every slot is given back long before its kernel begins."""
    files.heat(path, heat)
    stream = fake.create_stream()
    model = Model(fake, whole, stream, 15_000)
    with load(path, slots=slots, stream=stream) as loader:
        for _ in range(2):
            for layer in loader:
                model.compute(layer)
    assert model.check() == 2 * LAYERS
    fake.destroy_stream(stream)


def test_nor_is_one_copied_into_from_host_memory(fake: FakeCuda, path: Path, whole: dict[str, bytes]) -> None:
    stream = fake.create_stream()
    model = Model(fake, whole, stream, 15_000)
    with load(path, stream=stream, budget_host=1 << 30) as loader:
        read = loader.stats().read_bytes
        for _ in range(3):
            for layer in loader:
                assert layer.tier == "host"
                model.compute(layer)
        stats = loader.stats()
        assert stats.read_bytes == read
        assert stats.copied_bytes == 3 * loader.nbytes
    assert model.check() == 3 * LAYERS
    fake.destroy_stream(stream)


def test_layers_from_host_memory_are_waited_for_by_the_stream(
    fake: FakeCuda, path: Path, whole: dict[str, bytes]
) -> None:
    """Nobody waits for these copies on the host: kernels that do not, compute with the layer before."""
    fake.set_copy_time(delay_us=15_000)
    stream = fake.create_stream()
    model = Model(fake, whole, stream, 0)
    with load(path, stream=stream, budget_host=1 << 30) as loader:
        for layer in loader:
            model.compute(layer)
    assert model.check() == LAYERS
    fake.destroy_stream(stream)


def test_kernels_on_another_stream_too(fake: FakeCuda, path: Path, whole: dict[str, bytes]) -> None:
    """Given back with the stream that used it, or with both."""
    streams = [fake.create_stream() for _ in range(2)]
    model = Model(fake, whole, streams[0], 15_000)
    with load(path, stream=streams[0], slots=1) as loader:
        for layer in loader:
            model.compute(layer)
            model.compute(layer, streams[1])
            layer.release(streams[1])
    fake.synchronize(streams[1])
    assert model.check() == 2 * LAYERS
    for stream in streams:
        fake.destroy_stream(stream)


def test_what_had_the_memory_before_comes_first(fake: FakeCuda, path: Path, whole: dict[str, bytes]) -> None:
    """Allocators hand memory on while kernels that use it are still queued."""
    with fake.gate() as gate:  # the default stream
        threading.Timer(0.1, gate.set).start()
        with load(path, stream=0) as loader:
            assert not loader._ring.slots[0].may_be_filled()
            model = Model(fake, whole, 0, 0)
            model.compute(loader[0])
            assert gate.is_set()
            model.check()


def test_reading_ahead_does_not_hold_up_the_layer_that_is_wanted(
    fake: FakeCuda, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A read behind a kernel that has not run would keep the engine's streams from the layer that is waited for."""
    data = {f"blk.{number}.w": files.contents(size * MIB, seed=number) for number, size in enumerate((1, 16, 1))}
    gpunvme.save_file({name: np.frombuffer(part, np.uint8) for name, part in data.items()}, tmp_path / "m")
    stream = fake.create_stream()
    model = Model(fake, data, stream, 0)
    fake.set_copy_time(delay_us=5000)
    start = layer_ring.Slot.start
    held_up: list[bool] = []

    def noted(self: Any, layer: Any, copy: Any, timeout: Any) -> None:
        others = any(slot.in_flight for slot in loader._ring.slots if slot is not self)
        held_up.append(others and not self.may_be_filled())
        start(self, layer, copy, timeout)

    with load(tmp_path / "m", stream=stream, slots=2) as loader:
        monkeypatch.setattr(layer_ring.Slot, "start", noted)
        first = loader[0]
        with fake.gate(stream=stream) as gate:
            model.compute(first)
            second = loader[1]
            assert not gate.is_set()
            model.compute(second)
        model.compute(loader[2])
    assert held_up[:3] == [False] * 3
    assert model.check() == 3
    fake.destroy_stream(stream)


def test_layers_that_stay(fake: FakeCuda, path: Path, whole: dict[str, bytes]) -> None:
    size = one_size(path)
    gc.collect()
    before = fake.counters().live_allocated_bytes
    with load(path, budget_gpu=4 * size) as loader:
        assert 3 * size < fake.counters().live_allocated_bytes - before <= 4 * size
        read = loader.stats().read_bytes
        model = Model(fake, whole, 0, 0)
        for layer in loader:
            model.compute(layer)
        hits = loader.stats().hits
        assert hits == {"device": 2, "source": LAYERS - 2}
        assert read >= 2 * NBYTES
        model.check()
    with pytest.raises(
        BudgetError, match=rf"budget_gpu={size} is too small: 2 slots .* take {2 * size} bytes at least"
    ):
        load(path, budget_gpu=size)
    with pytest.raises(BudgetError, match="budget_host=100 is too small: the smallest layer takes"):
        load(path, budget_host=100)


def take_all(loader: gpunvme.LayerLoader) -> None:
    for _layer in loader:
        pass


@pytest.mark.parametrize("k", [1, 3, 9])
def test_a_gpu_that_fails(fake: FakeCuda, path: Path, k: int) -> None:
    """Its error comes out, and the loader can still be closed."""
    loader = load(path)
    fake.fail_copy(fake_cuda.LAUNCH_FAILED, k)
    with pytest.raises(gpunvme.CudaError, match="LAUNCH_FAILED"):
        take_all(loader)
    loader.close()
    fake.control("fake_cuda_reset")


@pytest.mark.parametrize("function", ["cuEventRecord", "cuStreamWaitEvent", "cuEventCreate", "cuStreamCreate"])
def test_calls_that_fail(fake: FakeCuda, path: Path, whole: dict[str, bytes], function: str) -> None:
    gc.collect()
    before = fake.counters().live_allocations
    for call in range(1, 8):
        fake.fail_call(function, fake_cuda.ILLEGAL_ADDRESS, call)
        try:
            with load(path, budget_host=2 * NBYTES + 8192) as loader:
                take_all(loader)
        except gpunvme.CudaError as error:
            assert function in str(error)  # noqa: PT017 - not every call is made
        fake.control("fake_cuda_reset")
    gc.collect()
    assert fake.counters().live_allocations <= before  # fewer, where another test's went only now


def test_no_room(fake: FakeCuda, path: Path) -> None:
    fake.set_memory_limit(MIB // 2)
    with pytest.raises(gpunvme.CudaError, match="OUT_OF_MEMORY"):
        load(path)
    fake.control("fake_cuda_reset")
    fake.set_page_lock_limit(0)
    with pytest.raises(gpunvme.CudaError, match="cuMemHostAlloc") as caught:
        load(path, budget_host=1 << 30)
    assert "under budget_host" in caught.value.__notes__[0]


def test_nothing_is_left(fake: FakeCuda, path: Path) -> None:
    with load(path, budget_host=1 << 30) as loader:
        take_all(loader)  # what the engine keeps
    gc.collect()
    before = fake.counters().live()
    for _ in range(3):
        with load(path, budget_host=3 * NBYTES, budget_gpu=5 * NBYTES) as loader:
            take_all(loader)
        with pytest.raises(LayerError):
            loader[0]
    del loader
    gc.collect()
    after = fake.counters().live()
    assert after["live_events"] <= before["live_events"] + 64  # kept by the engine for copies to come
    assert {**after, "live_events": 0} == {**before, "live_events": 0}


def test_closed_while_kernels_compute(fake: FakeCuda, path: Path, whole: dict[str, bytes]) -> None:
    """The memory goes when nobody reads it any more: the fake aborts if it is freed under a kernel."""
    stream = fake.create_stream()
    model = Model(fake, whole, stream, 20_000)
    loader = load(path, stream=stream, slots=3)
    model.compute(loader[0])
    model.compute(loader[1])
    loader.close()
    del loader
    gc.collect()
    assert model.check() == 2
    fake.destroy_stream(stream)


def test_closed_while_reads_are_under_way(fake: FakeCuda, path: Path) -> None:
    for slots in (1, 2, 4):
        loader = load(path, slots=slots)
        loader[0]
        loader.close()
        assert fake.counters().pending_operations == 0


def test_a_gpu_that_does_not_answer(
    fake: FakeCuda, path: Path, whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gpunvme.transfer._GRACE", 0.05)
    with load(path, timeout=0.2) as loader:
        fake.hold()
        with pytest.raises(gpunvme.DeadlineExceeded) as caught:
            loader[1]
        assert "while reading layer 1 'blk.1'" in caught.value.__notes__
        fake.release()
        fake.wait_idle()
        model = Model(fake, whole, 0, 0)
        model.compute(loader[1])
        assert model.check() == 1


def test_ctrl_c(fake: FakeCuda, path: Path, whole: dict[str, bytes]) -> None:
    """Nothing writes into the slots any more, and the loader goes on."""
    with load(path) as loader:
        fake.hold()
        calls = fake.calls("cuMemcpyHtoDAsync")

        def interrupt() -> None:
            files.wait_until(lambda: fake.calls("cuMemcpyHtoDAsync") > calls)
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.1)
            fake.release()

        thread = threading.Thread(target=interrupt)
        thread.start()
        with pytest.raises(KeyboardInterrupt):
            loader[1]
        thread.join()
        model = Model(fake, whole, 0, 0)
        for layer in loader:
            model.compute(layer)
        assert model.check() == LAYERS


def test_a_forked_child(fake: FakeCuda, path: Path) -> None:
    with load(path) as loader:
        loader[0]
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                loader[1]
            except LayerError as error:
                os.write(writer, str(error).encode())
            loader.close()
            del loader
            gc.collect()
            os._exit(0)
        os.close(writer)
        with os.fdopen(reader) as pipe:
            assert "belongs to the parent process" in pipe.read()
        assert os.waitpid(child, 0)[1] == 0
        loader[1]


def test_by_namespace(fake: FakeCuda, tmp_path: Path, whole: dict[str, bytes]) -> None:
    image = tmp_path / "disk.img"
    extents, at = {}, 4096
    data = bytearray(4096)
    with gpunvme.nvme.open(f"soft:{image}?size=16MiB&lba=512") as controller:
        namespace = controller.namespace(1)
        for name, part in whole.items():
            extents[name] = (namespace, at, len(part))
            data += part
            at += len(part)
        data += bytes(-len(data) % 512)
        namespace.write_from(bytes(data))
        stream = fake.create_stream()
        model = Model(fake, whole, stream, 8000)
        with gpunvme.LayerLoader(extents, 0, framework="buffer", stream=stream) as loader:
            for _ in range(2):
                for layer in loader:
                    model.compute(layer)
            assert {path for paths in loader.stats().paths.values() for path in paths} == {"nvme"}
        assert model.check() == 2 * LAYERS
        fake.destroy_stream(stream)


def test_alignment(fake: FakeCuda, tmp_path: Path) -> None:
    """Kernels load vectors: what would be misaligned begins anew."""
    arrays = {f"blk.0.{n:02}": np.full(size, n, np.uint8) for n, size in enumerate([3, 4096, 17, 100, 1, 5000, 256])}
    gpunvme.save_file(arrays, tmp_path / "m.safetensors")
    with load(tmp_path / "m.safetensors") as loader:
        for name, buffer in loader[0].tensors.items():
            assert buffer.ptr % 16 == 0
            assert buffer.numpy().tobytes() == arrays[name].tobytes()


def test_hand_over_alone(fake: FakeCuda) -> None:
    """`passed` is about everything followed, not only the last."""
    order = _native.HandOver(0)
    slow, quick = fake.create_stream(), fake.create_stream()
    with fake.gate(stream=slow) as gate:
        order.follow(slow)
        order.follow(quick)
        fake.synchronize(quick)
        assert not order.passed()
        gate.set()
        order.wait()
    assert order.passed()
    del order
    for stream in (slow, quick):
        fake.destroy_stream(stream)
