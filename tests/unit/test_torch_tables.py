"""Tables of features as datasets: a wrong row trains a wrong model, and nobody notices."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

import gpunvme

if TYPE_CHECKING:
    import torch

    from gpunvme.torch import FeatureTable
else:
    torch = pytest.importorskip("torch")
    from gpunvme.torch import FeatureTable

pytestmark = pytest.mark.torch
ROWS = 1000


@pytest.fixture
def features() -> np.ndarray:
    return np.random.default_rng(0).random((ROWS, 3, 5), np.float32)


@pytest.fixture
def path(features: np.ndarray, tmp_path: Path) -> Path:
    (tmp_path / "table").write_bytes(b"header!" + features.tobytes())
    return tmp_path / "table"


def test_rows_by_number(path: Path, features: np.ndarray) -> None:
    table = FeatureTable(path, (3, 5), offset=7)
    assert len(table) == ROWS
    assert np.array_equal(table[17], features[17])
    assert np.array_equal(table[-1], features[-1])
    for indices in ([3, 999, 3, -1000], np.array([5]), torch.tensor([0, 7]), []):
        expected = features[np.asarray(indices, np.int64)]
        assert np.array_equal(table.gather(indices), expected)
    assert table.gather([1]).dtype == torch.float32
    assert sum(1 for _ in table) == ROWS
    table.close()
    assert np.array_equal(table[1], features[1])


@pytest.mark.parametrize("workers", [0, 2])
def test_loaders(path: Path, features: np.ndarray, workers: int) -> None:
    table = FeatureTable(path, (3, 5), offset=7)
    table[0]  # open before the workers are forked
    order = np.random.default_rng(1).permutation(ROWS)
    for collate in (FeatureTable.collate, None):
        loader = torch.utils.data.DataLoader(
            table, batch_size=300, sampler=order.tolist(), num_workers=workers, collate_fn=collate, timeout=30 * workers
        )
        batches = list(loader)
        assert [len(batch) for batch in batches] == [300, 300, 300, 100]
        assert np.array_equal(torch.cat(batches), features[order])


def test_a_batch_is_handed_on_as_it_was_read(path: Path) -> None:
    table = FeatureTable(path, (3, 5), offset=7)
    rows = table.__getitems__([1, 2])
    assert FeatureTable.collate(rows).data_ptr() == rows[0].data_ptr()
    assert torch.equal(FeatureTable.collate(list(rows)), rows.batch)


def test_pickled(path: Path, features: np.ndarray) -> None:
    table = FeatureTable(path, (3, 5), offset=7)
    assert np.array_equal(pickle.loads(pickle.dumps(table))[5], features[5])


@pytest.mark.parametrize("dtype", [np.float16, np.int64, np.uint8, "<f4"])
def test_numpy_tables(tmp_path: Path, dtype: type) -> None:
    array = np.arange(60).reshape(20, 3).astype(dtype)
    np.save(tmp_path / "table.npy", array)
    table = FeatureTable.from_npy(tmp_path / "table.npy")
    assert np.array_equal(table.gather(range(20)), array)


def test_what_is_no_table(tmp_path: Path, path: Path) -> None:
    for name, array in (
        ("fortran", np.asfortranarray(np.ones((3, 4)))),
        ("big", np.ones((3, 4), ">f4")),
        ("scalar", np.array(3.0)),
        ("object", np.array([None, {}])),
        ("text", np.array(["a"])),
    ):
        np.save(tmp_path / name, array, allow_pickle=True)
        with pytest.raises(gpunvme.FormatError):
            FeatureTable.from_npy(tmp_path / f"{name}.npy")
    with pytest.raises(gpunvme.FormatError):
        FeatureTable.from_npy(path)
    with pytest.raises(gpunvme.FormatError, match="no whole number of rows"):
        FeatureTable(path, (3, 5))
    with pytest.raises(gpunvme.RangeError, match="1001 rows end"):
        FeatureTable(path, (3, 5), offset=7, rows=1001)
    for bad in ({"shape": (0,)}, {"shape": 3, "offset": -1}, {"shape": 3, "rows": -1}):
        with pytest.raises(ValueError, match="must not be negative"):
            FeatureTable(path, **bad)
    with pytest.raises(gpunvme.MissingFileError):
        FeatureTable(tmp_path / "missing", 3)


def test_rows_that_are_not_there(path: Path) -> None:
    table = FeatureTable(path, (3, 5), offset=7)
    for bad in (ROWS, -ROWS - 1):
        with pytest.raises(IndexError, match=f"row {bad} of {ROWS}"):
            table[bad]
    with pytest.raises(IndexError):
        table.gather([0, 2**40])
    for bad in ([0.5], [[1, 2]]):
        with pytest.raises(TypeError):
            table.gather(bad)
