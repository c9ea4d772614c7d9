"""Layers from everything that layers are read from, in host memory: always the bytes that a plain load gives.

tests/emulated_gpu_layers.py does the same on a GPU that is emulated, by its own queues.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import pytest

import gpunvme
import layer_source_cases as cases

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    return cases.loaded(tmp_path_factory.mktemp("whole"))


def compare(loader: gpunvme.LayerLoader, laid: cases.Laid, whole: dict[str, bytes]) -> None:
    """Passes one behind the other, jumps in between; every tensor of every layer."""
    name_of = {called: name for name, called in laid.called.items()}
    seen: set[str] = set()

    def check(layer: Any) -> None:
        for called, array in layer.tensors.items():
            assert array.tobytes() == whole[name_of[called]], (layer, called)
            seen.add(name_of[called])

    for layer in loader:
        check(layer)
    for index in cases.orders(len(loader)):
        check(loader[index])
    assert seen == whole.keys()


@pytest.mark.parametrize("budget", ["none", "some", "all"])
@pytest.mark.parametrize("source", cases.FILES | cases.NAMESPACES)
def test_every_source_under_every_budget(tmp_path: Path, whole: dict[str, bytes], source: str, budget: str) -> None:
    if "gguf" in source:
        pytest.importorskip("gguf")
    with (cases.FILES | cases.NAMESPACES)[source](tmp_path) as laid:
        with gpunvme.LayerLoader(laid.source, framework="np", group=laid.group) as loader:
            sizes = [layer.slot_bytes for layer in loader._layers]
        room = {"none": None, "some": 2 * max(sizes) + min(sizes), "all": sum(sizes)}[budget]
        for path in ("auto", laid.path) if budget == "some" else ("auto",):
            with gpunvme.LayerLoader(
                laid.source, framework="np", group=laid.group, budget_host=room, path=path
            ) as loader:
                assert len(loader) > 3
                compare(loader, laid, whole)
                stats = loader.stats()
                assert {way for ways in stats.paths.values() for way in ways} == {laid.path}
                assert ("source" in stats.hits) == (budget != "all")
                assert loader._stay or budget == "none"


@pytest.mark.parametrize("lba", [512, 4096])
@pytest.mark.parametrize("source", cases.NAMESPACES)
def test_blocks_of_either_size(tmp_path: Path, whole: dict[str, bytes], source: str, lba: int) -> None:
    with (
        cases.NAMESPACES[source](tmp_path, lba) as laid,
        gpunvme.LayerLoader(laid.source, framework="np", group=laid.group, slots=3) as loader,
    ):
        compare(loader, laid, whole)


# --- a path by its name, for files that are open already


@pytest.mark.parametrize("source", ["catalog_on_a_namespace", "kinds_on_a_namespace", "open_file_on_a_namespace"])
def test_the_path_that_is_asked_for_is_taken_or_refused(tmp_path: Path, source: str) -> None:
    """Whoever says host must not get nvme without a word because the file was opened by somebody else."""
    with cases.NAMESPACES[source](tmp_path) as laid:
        for path in ("host", "gpu-nvme"):
            with pytest.raises(gpunvme.PathError, match="cannot carry this"):
                gpunvme.LayerLoader(laid.source, framework="np", path=path)[0]
        with pytest.raises(gpunvme.PathError, match="there is no path 'warp'"):
            gpunvme.LayerLoader(laid.source, framework="np", path="warp")
        with gpunvme.LayerLoader(laid.source, framework="np", path="nvme") as loader:
            loader[0]


def test_an_open_file_stays_its_owners(tmp_path: Path, whole: dict[str, bytes]) -> None:
    with cases.plain_file(tmp_path) as laid, gpunvme.open(tmp_path / "plain", path="host") as file:
        source = {name: (file, *place) for name, (_, *place) in laid.source.items()}
        for path in ("auto", "host"):
            with gpunvme.LayerLoader(source, framework="np", path=path) as loader:
                compare(loader, laid, whole)
            assert not file.closed
        with pytest.raises(gpunvme.PathError, match="nvme"):
            gpunvme.LayerLoader(source, framework="np", path="nvme")[0]


# --- catalogs that change meanwhile


def changed_twice(catalog: gpunvme.Catalog) -> None:
    """After this the space of the regions that were there is used again."""
    for byte in (b"\1", b"\2"):
        with catalog.change() as change:
            for region in catalog.regions:
                change.replace(region.kind, byte * region.nbytes)


@pytest.mark.parametrize("writer", ["another", "itself", "refreshed"])
def test_a_catalog_that_was_written_over_gives_an_error_and_not_other_weights(
    tmp_path: Path, whole: dict[str, bytes], writer: str
) -> None:
    path = tmp_path / "catalog"
    gpunvme.catalog.pack(cases.safetensors(tmp_path), path)
    with gpunvme.Catalog(path, "r+" if writer == "itself" else "r") as catalog:
        with gpunvme.LayerLoader(catalog, framework="np") as loader:
            for layer in loader:
                assert all(array.tobytes() == whole[name] for name, array in layer.tensors.items())
            if writer == "itself":
                changed_twice(catalog)
            else:
                with gpunvme.Catalog(path, "r+") as other:
                    changed_twice(other)
            if writer == "refreshed":
                catalog.refresh()
            for _ in range(2):  # it stays wrong
                for index in range(len(loader)):
                    with contextlib.suppress(gpunvme.CatalogChangedError):
                        layer = loader[index]  # those that were in their slots before
                        assert all(array.tobytes() == whole[name] for name, array in layer.tensors.items())
            with pytest.raises(gpunvme.CatalogChangedError, match="written again") as caught:
                list(loader)
            assert any("while reading layer" in note for note in caught.value.__notes__)
        if writer == "another":
            with pytest.raises(gpunvme.CatalogChangedError):
                gpunvme.LayerLoader(catalog, framework="np", budget_host=1 << 30)
            catalog.refresh()
        with gpunvme.LayerLoader(catalog, framework="np", budget_host=1 << 30) as loader:
            assert {byte for layer in loader for array in layer.tensors.values() for byte in array.tobytes()} == {2}


def test_one_change_leaves_a_loader_what_it_had(tmp_path: Path, whole: dict[str, bytes]) -> None:
    path = tmp_path / "catalog"
    gpunvme.catalog.pack(cases.safetensors(tmp_path), path)
    with (
        gpunvme.Catalog(path) as catalog,
        gpunvme.LayerLoader(catalog, framework="np", slots=1) as loader,
        gpunvme.Catalog(path, "r+") as other,
    ):
        other.delete("blk.1.a.weight")
        for layer in loader:
            assert all(array.tobytes() == whole[name] for name, array in layer.tensors.items())
