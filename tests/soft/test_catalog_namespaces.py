"""Catalogs on namespaces: both block sizes, and a controller that fails in the middle of a change."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import catalog_cases
import gpunvme
from gpunvme import nvme
from gpunvme.catalog import FilePart, pack

DATA = np.random.default_rng(8).bytes(50_000)
ROWS = np.arange(3000, dtype=np.float32).reshape(100, 30)


@pytest.mark.parametrize("lba", [512, 4096])
def test_regions_on_blocks(tmp_path: Path, lba: int) -> None:
    uri = f"nvme+soft:{tmp_path}/disk?size=16MiB&lba={lba}"
    with gpunvme.Catalog.create(uri) as catalog:
        catalog.add(None, ROWS, name="rows")
        catalog.add(9, DATA)
        assert "by nvme" in str(catalog._target.file.read_into(bytearray(lba)))
    with gpunvme.Catalog(uri, "r+") as catalog:
        assert catalog.read_kind("rows", 3, 5).numpy().tobytes() == ROWS[3:8].tobytes()
        assert catalog.gather_kind("rows", [99, 0]).numpy().tobytes() == ROWS[[99, 0]].tobytes()
        assert catalog.read_kind(9).numpy().tobytes() == DATA
        assert np.array_equal(catalog.load(framework="np")["rows"], ROWS)
        assert catalog.verify() == []
        with pytest.raises(gpunvme.CatalogError, match="no room"):
            catalog.add(None, bytes(14 << 20))
    # The format does not depend on blocks: the same bytes are a catalog on another device.
    other = 4608 - lba
    with gpunvme.Catalog(f"nvme+soft:{tmp_path}/disk?lba={other}", "r+") as catalog:
        assert catalog.read_kind(9).numpy().tobytes() == DATA
        catalog.delete(9)
    with gpunvme.Catalog(tmp_path / "disk") as catalog:
        assert list(catalog.load(framework="np")) == ["rows"]


@pytest.mark.parametrize("lba", [512, 4096])
def test_from_kinds_counts_in_the_namespaces_blocks(lba: int) -> None:
    with nvme.open(f"soft:ram?size=4MiB&lba={lba}") as controller:
        namespace = controller.namespace()
        namespace.write_from(DATA[: 8 * lba] if lba == 512 else DATA[: 8 * 4096], 3)
        with gpunvme.Catalog.from_kinds(namespace, {1: (4, 2 * lba), 2: (3, 100, 25)}) as kinds:
            assert kinds.read_kind(1).numpy().tobytes() == DATA[lba : 3 * lba]
            assert kinds.gather_kind(1, [1]).numpy().tobytes() == DATA[2 * lba : 3 * lba]
            assert kinds.gather_kind(2, [3, 0]).numpy().tobytes() == DATA[75:100] + DATA[:25]
        with pytest.raises(gpunvme.RangeError):
            gpunvme.Catalog.from_kinds(namespace, {1: (namespace.blocks, 1)})
        with pytest.raises(gpunvme.CatalogError, match="blocks have"):
            gpunvme.Catalog.from_kinds(namespace, {1: (0, 1)}, block_size=4608 - lba)


def test_a_namespace_with_data_is_left_alone() -> None:
    with nvme.open("soft:ram?size=4MiB") as controller:
        namespace = controller.namespace()
        block = np.zeros(512, np.uint8)
        block[7] = 1
        for lba in (5, namespace.blocks - 3):
            namespace.write_from(block, lba)
            before = namespace.read().numpy().tobytes()
            with pytest.raises(gpunvme.UnsafeDeviceError, match="overwrite='ram'"):
                gpunvme.Catalog.create(namespace)
            with pytest.raises(gpunvme.CatalogError, match="no catalog"):
                gpunvme.Catalog(namespace, "r+")
            assert namespace.read().numpy().tobytes() == before
            namespace.write_from(np.zeros(512, np.uint8), lba)
        namespace.write_from(block, 5)
        with gpunvme.Catalog.create(namespace, overwrite="ram") as catalog:
            catalog.add(1, b"x")
        gpunvme.Catalog(namespace).close()
    for size in ("1MiB", "2MiB"):
        with pytest.raises(gpunvme.CatalogError, match="a catalog needs"):
            gpunvme.Catalog.create(f"nvme+soft:ram?size={size}")


def change(catalog: gpunvme.Catalog) -> None:
    with catalog.change() as changing:
        changing.delete("rows")
        changing.replace(9, DATA[1:])
        changing.add(None, ROWS, name="new")


@pytest.mark.parametrize("fault", ["device-gone", "error:0x280!", "cfs", "drop"])
def test_a_controller_that_fails_at_any_command(tmp_path: Path, fault: str) -> None:
    """Old or new, whichever command it is; errors that the driver can repair cost nothing."""
    path = tmp_path / "disk"
    with gpunvme.Catalog.create(f"nvme+soft:{path}?size=8MiB&lba=4096") as catalog:
        catalog.add(None, ROWS, name="rows")
        catalog.add(9, DATA)
        old = catalog_cases.stored(catalog)
    image = path.read_bytes()
    outcomes = []
    for number in range(1, 60):
        path.write_bytes(image)
        failed = False
        with nvme.open(f"soft:{path}?lba=4096", timeout=0.3, admin_timeout=2) as controller:
            catalog = gpunvme.Catalog(controller.namespace(), "r+")
            controller.transport.controller.inject(f"{fault}#{number}", 1)
            try:
                change(catalog)
            except gpunvme.Error:
                failed = True
            injected = sum(
                n for what, n in controller.transport.controller.stats().items() if what.startswith("fault.")
            )
            if failed and fault != "device-gone":
                controller.transport.controller.inject("", 0)
                catalog.add(50, b"it goes on")
                catalog.delete(50)
                assert catalog.verify() == []
            catalog.close()
        with gpunvme.Catalog(path) as reader:
            assert reader.verify() == []
            found = catalog_cases.stored(reader)
            outcomes.append(found != old)
            assert outcomes[-1] or failed
            names = sorted(name for name, _ in found.values())
            assert found == old or (names == ["", "new"] and found[9][1] == DATA[1:])
        if not injected:
            break
    assert outcomes[-1] is True
    assert len(outcomes) > 4
    if fault in ("device-gone", "error:0x280!"):
        assert outcomes[0] is False


def test_hangs_and_repairs_while_packing(tmp_path: Path) -> None:
    tensors = {f"t{i}": np.random.default_rng(i).standard_normal(i * 40 + 1) for i in range(8)}
    gpunvme.save_file(tensors, tmp_path / "model.safetensors")
    faults = "reorder@0.3,duplicate-cqe@0.2,torn-cqe@0.1,stale-phase@0.1,drop#9"
    with nvme.open(f"soft:ram?size=8MiB&faults={faults}&seed=3", timeout=0.3, admin_timeout=2) as controller:
        pack(tmp_path / "model.safetensors", controller.namespace())
        with gpunvme.Catalog(controller.namespace()) as catalog:
            assert catalog.verify() == []
            loaded = catalog.load(framework="np")
    assert all(np.array_equal(loaded[name], array) for name, array in tensors.items())


def test_pieces_wait_for_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A slow device: a piece of the source must not be read into memory that is still being written."""
    monkeypatch.setattr("gpunvme.catalog.contents.PIECE", 16 << 10)
    (tmp_path / "source").write_bytes(DATA * 3)
    with (
        nvme.open("soft:ram?size=8MiB&lba=4096&faults=slow:10") as controller,
        gpunvme.open(tmp_path / "source") as source,
        gpunvme.Catalog.create(controller.namespace()) as catalog,
    ):
        catalog.add(1, FilePart(source, 0, len(DATA) * 3))
        controller.transport.controller.inject("", 0)
        assert catalog.verify() == []
        assert catalog.read_kind(1).numpy().tobytes() == DATA * 3
