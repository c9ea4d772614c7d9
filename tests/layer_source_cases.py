"""One model, laid out in every way that a `LayerLoader` takes: what comes out must be what a plain load gives."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

import gpunvme
from gpunvme import nvme
from gpunvme.catalog import pack

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

LAYERS = 5
BLOCK = 512


class Laid(NamedTuple):
    """A source, the path that carries it to host memory, and what a loader calls each tensor of the model."""

    source: Any
    path: str
    called: dict[str, str]
    group: Callable[[str], int] | None = None


def model() -> dict[str, np.ndarray[Any, Any]]:
    """Layers of unequal sizes, few of them whole pages, none of them alike."""
    rng = np.random.default_rng(11)
    found = {"token_embd.weight": rng.random((90, 7), np.float32)}
    for number in range(LAYERS):
        found[f"blk.{number}.a.weight"] = rng.random((70 + number, 64), np.float32)
        found[f"blk.{number}.b.scale"] = rng.integers(-9, 9, 5001 + 400 * number).astype(np.int8)
    found["output_norm.weight"] = rng.random(64, np.float32)
    return found


def safetensors(directory: Path) -> Path:
    gpunvme.save_file(model(), directory / "model.safetensors")
    return directory / "model.safetensors"


def same(names: Any) -> dict[str, str]:
    return {name: name for name in names}


@contextlib.contextmanager
def one_file(directory: Path) -> Iterator[Laid]:
    yield Laid(safetensors(directory), "host", same(model()))


@contextlib.contextmanager
def shards(directory: Path) -> Iterator[Laid]:
    whole = model()
    for number in range(3):
        part = {name: whole[name] for name in sorted(whole)[number::3]}
        gpunvme.save_file(part, directory / f"model-0000{number + 1}-of-00003.safetensors")
    yield Laid(directory, "host", same(whole))


@contextlib.contextmanager
def gguf_shards(directory: Path) -> Iterator[Laid]:
    import gguf_cases

    whole = model()
    for number in range(2):
        part = {name: whole[name] for name in sorted(whole)[number::2]}
        gguf_cases.written(directory / f"model-0000{number + 1}-of-00002.gguf", {}, part)
    yield Laid(directory, "host", same(whole))


@contextlib.contextmanager
def catalog_in_a_file(directory: Path) -> Iterator[Laid]:
    pack(safetensors(directory), directory / "catalog")
    with gpunvme.Catalog(directory / "catalog") as catalog:
        yield Laid(catalog, "host", same(model()))


def flat(start: int) -> tuple[bytes, dict[str, tuple[int, int, Any, tuple[int, ...]]]]:
    """The tensors one behind the other from byte ``start`` on, and where each is."""
    data, found = bytearray(start), {}
    for name, array in model().items():
        found[name] = len(data), array.nbytes, array.dtype, array.shape
        data += array.tobytes()
    return bytes(data), found


@contextlib.contextmanager
def plain_file(directory: Path) -> Iterator[Laid]:
    data, places = flat(1001)
    (directory / "plain").write_bytes(data)
    yield Laid({name: (directory / "plain", *place) for name, place in places.items()}, "host", same(places))


@contextlib.contextmanager
def kinds_in_a_file(directory: Path) -> Iterator[Laid]:
    """Regions that somebody else laid out: each on a block, with a number and no name."""
    data, kinds = bytearray(3 * BLOCK), {}
    whole = model()
    for number, array in enumerate(whole.values(), 20):
        kinds[number] = len(data) // BLOCK, array.nbytes
        data += array.tobytes()
        data += bytes(-len(data) % BLOCK)
    (directory / "disk").write_bytes(data)
    called = {name: f"#{number}" for number, name in enumerate(whole, 20)}
    with gpunvme.Catalog.from_kinds(directory / "disk", kinds) as catalog:
        yield Laid(catalog, "host", called, lambda name: int(name[1:]) // 3)


# On a namespace; `namespaces` says of which block size.


@contextlib.contextmanager
def catalog_on_a_namespace(directory: Path, lba: int = BLOCK) -> Iterator[Laid]:
    with nvme.open(f"soft:ram?size=8MiB&lba={lba}&queues=12", queues=2) as controller:
        pack(safetensors(directory), controller.namespace())
        with gpunvme.Catalog(controller.namespace()) as catalog:
            yield Laid(catalog, "nvme", same(model()))


@contextlib.contextmanager
def raw_namespace(directory: Path, lba: int = BLOCK) -> Iterator[Laid]:
    data, places = flat(lba + 3)
    with nvme.open(f"soft:ram?size=8MiB&lba={lba}&queues=12", queues=2) as controller:
        namespace = controller.namespace()
        namespace.write_from(data + bytes(-len(data) % lba))
        yield Laid({name: (namespace, *place) for name, place in places.items()}, "nvme", same(places))


@contextlib.contextmanager
def kinds_on_a_namespace(directory: Path, lba: int = BLOCK) -> Iterator[Laid]:
    with nvme.open(f"soft:ram?size=8MiB&lba={lba}&queues=12", queues=2) as controller:
        namespace, at, kinds = controller.namespace(), 2, {}
        whole = model()
        for number, array in enumerate(whole.values(), 20):
            data = array.tobytes()
            namespace.write_from(data + bytes(-len(data) % lba), at)
            kinds[number] = at, len(data)
            at += -(-len(data) // lba) + 1
        called = {name: f"#{number}" for number, name in enumerate(whole, 20)}
        with gpunvme.Catalog.from_kinds(namespace, kinds) as catalog:
            yield Laid(catalog, "nvme", called, lambda name: int(name[1:]) // 3)


@contextlib.contextmanager
def open_file_on_a_namespace(directory: Path, lba: int = BLOCK) -> Iterator[Laid]:
    with raw_namespace(directory, lba) as laid:
        (namespace, *_), *_ = laid.source.values()
        with gpunvme.open(namespace) as file:
            yield laid._replace(source={name: (file, *place) for name, (_, *place) in laid.source.items()})


FILES = {
    make.__name__: make for make in (one_file, shards, gguf_shards, catalog_in_a_file, plain_file, kinds_in_a_file)
}
NAMESPACES = {
    make.__name__: make
    for make in (catalog_on_a_namespace, raw_namespace, kinds_on_a_namespace, open_file_on_a_namespace)
}


def loaded(directory: Path) -> dict[str, bytes]:
    """What a plain load of the model gives."""
    (directory / "whole").mkdir()
    found = gpunvme.load_file(safetensors(directory / "whole"), framework="np")
    return {name: array.tobytes() for name, array in found.items()}


def orders(layers: int) -> list[int]:
    """Two passes, one behind the other, random access, some layers twice, and another pass."""
    one = list(range(layers))
    jumps = [int(number) for number in np.random.default_rng(5).integers(0, layers, 9)]
    return [*one, *one, *jumps, *one]
