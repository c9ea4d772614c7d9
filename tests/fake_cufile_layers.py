"""Layers by the ``cufile/…`` paths, on the libcufile and the libcuda for tests.

test_cufile.py runs it in its own process.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

import fake_cuda
import gpunvme
import layer_source_cases as cases

if TYPE_CHECKING:
    from pathlib import Path

    from fake_cuda import FakeCuda
    from fake_cufile import FakeCufile

pytest_plugins = ["fake_cufile_fixtures"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    return cases.loaded(tmp_path_factory.mktemp("whole"))


CASES: list[tuple[str, dict[str, Any]]] = [
    *((source, {}) for source in cases.FILES),
    ("shards", {"slots": 1}),
    ("catalog_in_a_file", {"budget_gpu": 110 << 10}),
]


@pytest.mark.parametrize(("source", "budget"), CASES)
def test_layers_by_cufile(
    cuda: FakeCuda,
    cufile: FakeCufile,
    tmp_path: Path,
    whole: dict[str, bytes],
    way: str,
    source: str,
    budget: dict[str, Any],
) -> None:
    """Delayed kernels copy each layer away: what they saw is what a plain load gives, also where reads come short."""
    if "gguf" in source:
        pytest.importorskip("gguf")
    cufile.set(short=5000)
    with cases.FILES[source](tmp_path) as laid:
        name_of = {called: name for name, called in laid.called.items()}
        stream = cuda.create_stream()
        seen = []
        how = {"framework": "buffer", "group": laid.group, "path": way, "stream": stream}
        with gpunvme.LayerLoader(laid.source, 0, **how, **budget) as loader:
            for index in cases.orders(len(loader)):
                for called, buffer in loader[index].tensors.items():
                    copy = cuda.alloc(buffer.nbytes)
                    tensor = fake_cuda.FakeDeviceBuffer(cuda, buffer.ptr, buffer.nbytes, 0)
                    tensor.copy_to(copy, stream=stream, delay_us=1000)
                    seen.append((name_of[called], copy))
            assert {path for paths in loader.stats().paths.values() for path in paths} == {way}
        cuda.synchronize(stream)
        for name, copy in seen:
            assert copy.peek() == whole[name], name
            copy.free()
        cuda.destroy_stream(stream)
