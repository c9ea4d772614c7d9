"""Layers by the ``gpu-nvme`` path: read by kernels that drive NVMe queues, while delayed kernels compute with others.

On the emulated GPU; test_file_gpu.py runs it in its own process.
"""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING, Any

import pytest

import emulated_gpu
import fake_cuda
import gpunvme
import layer_source_cases as cases
from gpunvme import nvme

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from fake_cuda import FakeCuda


@pytest.fixture
def gpu() -> Iterator[FakeCuda]:
    cuda = emulated_gpu.use()
    yield cuda
    gc.collect()
    cuda.reset()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    return cases.loaded(tmp_path_factory.mktemp("whole"))


class Computation:
    """Kernels on a stream that copy each tensor away, long after the host has asked for the next layers.

    What they copy to is there before: nothing may be allocated while kernels run.
    """

    def __init__(self, gpu: FakeCuda, laid: cases.Laid, delay_us: int) -> None:
        self._gpu, self._delay_us = gpu, delay_us
        self._name_of = {called: name for name, called in laid.called.items()}
        self._seen: list[tuple[str, fake_cuda.FakeDeviceBuffer]] = []
        self._room = gpu.alloc(4 << 20)
        self._used = 0
        self.stream = gpu.create_stream()

    def run(self, layer: Any) -> None:
        for called, buffer in layer.tensors.items():
            seen = fake_cuda.FakeDeviceBuffer(self._gpu, self._room.ptr + self._used, buffer.nbytes, 0)
            self._used += buffer.nbytes
            assert self._used <= self._room.nbytes
            tensor = fake_cuda.FakeDeviceBuffer(self._gpu, buffer.ptr, buffer.nbytes, 0)
            tensor.copy_to(seen, stream=self.stream, delay_us=self._delay_us)
            self._seen.append((self._name_of[called], seen))

    def check(self, whole: dict[str, bytes]) -> None:
        self._gpu.synchronize(self.stream)
        assert {name for name, _ in self._seen} == whole.keys()
        for name, seen in self._seen:
            assert seen.peek() == whole[name], name
        self._room.free()
        self._gpu.destroy_stream(self.stream)


BUDGETS: dict[str, dict[str, Any]] = {
    "two slots": {},
    "one slot": {"slots": 1},
    "some stay": {"budget_gpu": 110 << 10, "slots": 2},
    "all stay": {"budget_gpu": 1 << 20},
}


CASES = [
    *((source, *how) for source in cases.NAMESPACES for how in (("two slots", 3000), ("some stay", 0))),
    ("catalog_on_a_namespace", "one slot", 3000),
    ("catalog_on_a_namespace", "all stay", 0),
]


@pytest.mark.parametrize(("source", "budget", "delay_us"), CASES)
def test_layers_by_queues_of_the_gpu(
    gpu: FakeCuda, tmp_path: Path, whole: dict[str, bytes], source: str, budget: str, delay_us: int
) -> None:
    """Passes one behind the other and random access; nothing waits for the GPU in between."""
    with cases.NAMESPACES[source](tmp_path, 4096 if budget == "one slot" else 512) as laid:
        computation = Computation(gpu, laid, delay_us)
        how = {"framework": "buffer", "path": "gpu-nvme", "group": laid.group, "stream": computation.stream}
        with gpunvme.LayerLoader(laid.source, "cuda:0", **how, **BUDGETS[budget]) as loader:
            for layer in loader:
                computation.run(layer)
            for index in cases.orders(len(loader)):
                computation.run(loader[index])
            stats = loader.stats()
        assert {way for ways in stats.paths.values() for way in ways} == {"gpu-nvme"}
        assert all("kernels on cuda:0" in reason for reason in stats.reasons.values())
        assert ("source" in stats.hits) == (budget != "all stay")
        assert budget != "some stay" or stats.hits["device"] > 3
        computation.check(whole)


def test_the_queues_are_given_back(gpu: FakeCuda, tmp_path: Path) -> None:
    """Also those of a file that somebody else has open by another path."""
    with cases.open_file_on_a_namespace(tmp_path) as laid:
        (file, *_), *_ = laid.source.values()
        controller = file._file.namespace.controller
        left = controller.queues_left()
        before = gpu.counters().live()
        for _ in range(2):
            with gpunvme.LayerLoader(laid.source, 0, framework="buffer", path="gpu-nvme") as loader:
                loader[1]
                assert controller.queues_left() < left
            assert controller.queues_left() == left
            file.read(3, 5000)
        del loader
        gc.collect()
        assert {key: n for key, n in gpu.counters().live().items() if n > before[key] + 64 * ("event" in key)} == {}


def test_layers_that_would_stay_in_host_memory_are_refused_with_the_reason(gpu: FakeCuda, tmp_path: Path) -> None:
    with cases.raw_namespace(tmp_path) as laid:
        how = {"framework": "buffer", "budget_host": 1 << 20}
        with pytest.raises(gpunvme.PathError, match="gpu-nvme") as caught:
            gpunvme.LayerLoader(laid.source, 0, path="gpu-nvme", **how)
        assert any("budget_host=" in note and "path='auto'" in note for note in caught.value.__notes__)
        with gpunvme.LayerLoader(laid.source, 0, **how) as loader:
            assert loader[0].tier == "host"


@pytest.mark.parametrize("fault", ["drop#7", "cfs#9", "error:0x281#5"])
def test_commands_that_go_wrong_are_mended_or_told(gpu: FakeCuda, whole: dict[str, bytes], fault: str) -> None:
    """A layer is right or an error, and the next time it is asked for it is right."""
    data, places = cases.flat(512)
    with nvme.open("soft:ram?size=8MiB&queues=12&mdts=1", queues=2, timeout=0.3) as controller:
        namespace = controller.namespace()
        namespace.write_from(data + bytes(-len(data) % 512))
        extents = {name: (namespace, *place) for name, place in places.items()}
        with gpunvme.LayerLoader(extents, 0, framework="buffer", path="gpu-nvme") as loader:
            loader[0]
            controller.transport.controller.inject(fault, 1)
            failures = 0
            for index in [*range(len(loader)), *range(len(loader))]:
                try:
                    layer = loader[index]
                except gpunvme.NvmeError:
                    failures += 1
                    layer = loader[index]
                for name, buffer in layer.tensors.items():
                    assert buffer.numpy().tobytes() == whole[name], name
            assert failures <= 1


def test_a_catalog_that_was_written_over(gpu: FakeCuda, tmp_path: Path) -> None:
    with cases.catalog_on_a_namespace(tmp_path) as laid:
        catalog = laid.source
        with gpunvme.LayerLoader(catalog, 0, framework="buffer", path="gpu-nvme", slots=1) as loader:
            loader[0]
            with gpunvme.Catalog(catalog._target.namespace, "r+") as other:
                for byte in (b"\1", b"\2"):
                    with other.change() as change:
                        for region in other.regions:
                            change.replace(region.kind, byte * region.nbytes)
            with pytest.raises(gpunvme.CatalogChangedError, match="written again"):
                loader[1]
