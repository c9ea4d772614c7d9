"""A model layer by layer on a real GPU: what the whole model computes, whatever stays where, and however far ahead."""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import gpunvme
from gpunvme import nvme

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

torch = pytest.importorskip("torch")
pytestmark = [pytest.mark.gpu, pytest.mark.torch]

LAYERS, WIDTH = 8, 1024
# Cycles that a kernel before each computation waits for: the host is then far ahead of the GPU.
SLOW = 20_000_000


@pytest.fixture(scope="module", autouse=True)
def _torch_sees_a_gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("this PyTorch has no CUDA")


@pytest.fixture(scope="module")
def whole() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(3)

    def random(*shape: int) -> Any:
        return torch.randn(*shape, generator=generator) / WIDTH**0.5

    found = {"model.embed_tokens.weight": random(500, WIDTH), "lm_head.weight": random(500, WIDTH)}
    for number in range(LAYERS):
        found[f"model.layers.{number}.up.weight"] = random(2 * WIDTH, WIDTH)
        found[f"model.layers.{number}.down.weight"] = random(WIDTH, 2 * WIDTH)
        found[f"model.layers.{number}.norm.bias"] = random(WIDTH + number)
    return found


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory, whole: dict[str, Any]) -> Path:
    path = tmp_path_factory.mktemp("model") / "model.safetensors"
    gpunvme.save_file(whole, path)
    return path


def compute(layers: Iterator[tuple[str, dict[str, Any]]], slow: int = 0) -> Any:
    """Logits for a few words; every kernel reads a layer's weights."""
    x = torch.empty(0)
    for name, tensors in layers:
        if slow:
            torch.cuda._sleep(slow)
        if name == "front":
            x = tensors["model.embed_tokens.weight"][:64].clone()  # a view would be overwritten with its slot
        elif name == "back":
            x = x @ tensors["lm_head.weight"].T
        else:
            y = torch.relu(x @ tensors[f"{name}.up.weight"].T) @ tensors[f"{name}.down.weight"].T
            x = x + y + tensors[f"{name}.norm.bias"][:WIDTH]
    return x


@pytest.fixture(scope="module")
def expected(path: Path) -> Any:
    loaded = gpunvme.load_file(path, device="cuda")
    names = ["front", *(f"model.layers.{number}" for number in range(LAYERS)), "back"]
    return compute((name, loaded) for name in names).cpu()


def of(loader: gpunvme.LayerLoader) -> Iterator[tuple[str, dict[str, Any]]]:
    return ((layer.name, layer.tensors) for layer in loader)


LAYER_BYTES = 4 * (4 * WIDTH * WIDTH + 2 * WIDTH) + 8192
OPTIONS: dict[str, dict[str, Any]] = {
    "one slot": {"slots": 1},
    "two slots": {},
    "four slots": {"slots": 4},
    "some stay": {"budget_gpu": 5 * LAYER_BYTES},
    "all stay": {"budget_gpu": 1 << 30},
    "some page-locked": {"budget_host": 4 * LAYER_BYTES},
    "all page-locked": {"budget_host": 1 << 30},
    "a bit of each": {"budget_gpu": 4 * LAYER_BYTES, "budget_host": 3 * LAYER_BYTES, "slots": 3},
    "the host path": {"path": "host"},
}


@pytest.mark.parametrize("slow", [0, SLOW])
@pytest.mark.parametrize("options", OPTIONS)
def test_equal_to_the_whole_model(path: Path, expected: Any, options: str, slow: int) -> None:
    with gpunvme.LayerLoader(path, "cuda", **OPTIONS[options]) as loader:
        results = [compute(of(loader), slow) for _ in range(3)]  # nothing waits for the GPU in between
        stats = loader.stats()
    for result in results:
        torch.testing.assert_close(result.cpu(), expected, rtol=1e-3, atol=1e-3)
    assert stats.layers == 3 * (LAYERS + 2)
    if "budget_gpu" in OPTIONS[options]:
        assert stats.hits["device"] >= 3
    if options == "all page-locked":
        assert stats.hits["host"] >= 3 * LAYERS


def test_weights_to_the_bit(path: Path, whole: dict[str, Any]) -> None:
    with gpunvme.LayerLoader(path, "cuda", slots=3) as loader:
        for _ in range(2):
            for layer in loader:
                for name, tensor in layer.tensors.items():
                    assert tensor.device.type == "cuda"
                    assert tensor.data_ptr() % 16 == 0
                    assert torch.equal(tensor.cpu(), whole[name]), name


@pytest.mark.parametrize("options", ["one slot", "two slots", "some stay"])
def test_by_the_gpus_own_queues(path: Path, whole: dict[str, Any], expected: Any, options: str) -> None:
    """A catalog on a namespace, read by kernels while others compute, and nothing waits for the GPU in between."""
    with nvme.open("soft:ram?size=256MiB&lba=4096&queues=16&threads=4", queues=2) as controller:
        gpunvme.catalog.pack(path, controller.namespace())
        with (
            gpunvme.Catalog(controller.namespace()) as catalog,
            gpunvme.LayerLoader(catalog, "cuda", path="gpu-nvme", **OPTIONS[options]) as loader,
        ):
            for layer in loader:
                for name, tensor in layer.tensors.items():
                    assert torch.equal(tensor.cpu(), whole[name]), name
            results = [compute(of(loader), SLOW) for _ in range(2)]
            stats = loader.stats()
        for result in results:
            torch.testing.assert_close(result.cpu(), expected, rtol=1e-3, atol=1e-3)
    assert {way for ways in stats.paths.values() for way in ways} == {"gpu-nvme"}


def test_on_streams_of_ones_own(path: Path, expected: Any) -> None:
    side = torch.cuda.Stream()
    with torch.cuda.stream(side), gpunvme.LayerLoader(path, "cuda") as loader:
        results = [compute(of(loader), SLOW) for _ in range(2)]
    side.synchronize()
    with gpunvme.LayerLoader(path, "cuda", slots=1) as loader:
        for layer in loader:
            with torch.cuda.stream(side):
                torch.cuda._sleep(SLOW)
                copies = {name: tensor.clone() for name, tensor in layer.tensors.items()}
            layer.release(side)
            results.append(copies)
    side.synchronize()
    for result in results[:2]:
        torch.testing.assert_close(result.cpu(), expected, rtol=1e-3, atol=1e-3)
    loaded = gpunvme.load_file(path, device="cuda")
    assert all(torch.equal(tensor, loaded[name]) for copies in results[2:] for name, tensor in copies.items())


def test_memory_stays_within_the_budget(path: Path) -> None:
    gc.collect()  # what other tests left behind
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    with gpunvme.LayerLoader(path, "cuda", budget_gpu=5 * LAYER_BYTES) as loader:
        for _layer in loader:
            pass
        assert torch.cuda.max_memory_allocated() - before <= 5 * LAYER_BYTES
    del loader, _layer
    gc.collect()
    assert torch.cuda.memory_allocated() == before


def test_without_a_framework(path: Path, whole: dict[str, Any]) -> None:
    with gpunvme.LayerLoader(path, 0, framework="buffer") as loader:
        for layer in loader:
            for name, buffer in layer.tensors.items():
                assert np.array_equal(buffer.numpy().view(np.float32), whole[name].numpy().reshape(-1))


def test_closed_while_kernels_compute(path: Path, expected: Any) -> None:
    loader = gpunvme.LayerLoader(path, "cuda", slots=2)
    result = compute(of(loader), SLOW)
    loader.close()
    junk = [torch.full((4 << 20,), 7.0, device="cuda") for _ in range(8)]  # takes the memory that was given back
    torch.testing.assert_close(result.cpu(), expected, rtol=1e-3, atol=1e-3)
    del junk
