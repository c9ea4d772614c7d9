"""A checkpoint is several files: one that is missing, misnamed or hostile has to stop the load before it starts."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gpunvme.errors import FileError, FormatError
from gpunvme.models import load_file, save_file

FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def shard(path: Path, **values: int) -> Path:
    save_file({name: np.full(3, value, np.float32) for name, value in values.items()}, path)
    return path


def index(directory: Path, weight_map: Any, name: str = "model.safetensors.index.json") -> Path:
    path = directory / name
    path.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    return path


def load(source: Any, **options: Any) -> dict[str, Any]:
    return load_file(source, framework="np", **options)


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    shard(tmp_path / FIRST, a=1, b=2)
    shard(tmp_path / SECOND, c=3)
    return index(tmp_path, {"a": FIRST, "b": FIRST, "c": SECOND})


def test_every_way_to_name_a_checkpoint(sharded: Path) -> None:
    directory = sharded.parent
    for source in (sharded, str(sharded), directory, [directory / FIRST, str(directory / SECOND)]):
        assert {name: array[0] for name, array in load(source).items()} == {"a": 1, "b": 2, "c": 3}
    assert list(load(directory / FIRST)) == ["a", "b"]
    sharded.unlink()
    assert list(load(directory)) == ["a", "b", "c"]


def test_a_directory_is_read_as_transformers_reads_it(sharded: Path) -> None:
    shard(sharded.parent / "model.safetensors", whole=4)
    assert list(load(sharded.parent)) == ["whole"]


def test_a_directory_with_another_index(tmp_path: Path) -> None:
    shard(tmp_path / "unet.safetensors", a=1)
    index(tmp_path, {"a": "unet.safetensors"}, "diffusion_pytorch_model.safetensors.index.json")
    assert list(load(tmp_path)) == ["a"]
    index(tmp_path, {"a": "unet.safetensors"}, "diffusion_pytorch_model.fp16.safetensors.index.json")
    with pytest.raises(FormatError, match="2 indexes"):
        load(tmp_path)


def test_shards_in_a_directory_below_and_behind_links(tmp_path: Path) -> None:
    # Download caches keep files elsewhere and link to them.
    (tmp_path / "blobs").mkdir()
    (tmp_path / "model").mkdir()
    shard(tmp_path / "blobs" / "8c6f", a=1)
    (tmp_path / "model" / "part").symlink_to(tmp_path / "blobs" / "8c6f")
    assert list(load(index(tmp_path, {"a": "model/part"}))) == ["a"]


def test_a_missing_shard_is_named(sharded: Path) -> None:
    (sharded.parent / SECOND).unlink()
    with pytest.raises(FileError, match="does not exist") as caught:
        load(sharded)
    assert caught.value.errno == errno.ENOENT
    assert caught.value.filename == str(sharded.parent / SECOND)


def test_without_an_index_a_missing_shard_is_noticed_by_its_number(sharded: Path) -> None:
    sharded.unlink()
    (sharded.parent / SECOND).unlink()
    with pytest.raises(FormatError, match="1 of the 2 shards"):
        load(sharded.parent)


def test_missing_files_are_errors_of_the_file(tmp_path: Path) -> None:
    for source in (tmp_path, tmp_path / "none.safetensors", tmp_path / "none.index.json", [tmp_path / "none"]):
        with pytest.raises(FileError) as caught:
            load(source)
        assert caught.value.errno == errno.ENOENT


def test_a_tensor_in_two_shards(tmp_path: Path) -> None:
    shard(tmp_path / FIRST, a=1, b=2)
    shard(tmp_path / SECOND, b=3)
    for source in (tmp_path, [tmp_path / FIRST, tmp_path / SECOND], index(tmp_path, {"a": FIRST, "b": SECOND})):
        with pytest.raises(FormatError, match="as well") as caught:
            load(source)
        assert caught.value.tensor == "b"


@pytest.mark.parametrize(
    ("weight_map", "tensor", "says"),
    [
        ({"a": FIRST, "b": FIRST, "c": SECOND, "d": SECOND}, "d", "does not hold it"),
        ({"a": FIRST, "b": SECOND, "c": SECOND}, "b", "does not hold it"),
        ({"a": FIRST, "c": SECOND}, "b", "not in the index"),
        ({"a": "../stolen.safetensors"}, "a", "outside the directory"),
        ({"a": "x/../../stolen.safetensors"}, "a", "outside the directory"),
        ({"a": "/etc/passwd"}, "a", "outside the directory"),
        ({"a": 1}, "a", "names no file"),
        ({"a": ""}, "a", "names no file"),
        ({"a": "a\0b"}, "a", "names no file"),
        ([], None, "no object weight_map"),
    ],
)
def test_an_index_that_is_wrong(sharded: Path, weight_map: Any, tensor: str | None, says: str) -> None:
    shard(sharded.parent.parent / "stolen.safetensors", a=1)
    index(sharded.parent, weight_map)
    with pytest.raises(FormatError, match=says) as caught:
        load(sharded)
    assert caught.value.tensor == tensor
    assert caught.value.filename == str(sharded)


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", "{", '{"weight_map":{"a":"x","a":"y"}}', "[" * 200_000, "\xff", '{"weight_map":null}']
)
def test_an_index_that_is_none(tmp_path: Path, text: str) -> None:
    path = tmp_path / "model.safetensors.index.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(FormatError) as caught:
        load(path)
    assert caught.value.filename == str(path)


def test_keys_and_filter_choose(sharded: Path) -> None:
    assert list(load(sharded, keys=["c", "a"])) == ["a", "c"]
    assert list(load(sharded, filter=lambda name: name != "b")) == ["a", "c"]
    assert list(load(sharded, keys={"a", "b"}, filter=lambda name: name != "b")) == ["a"]
    assert load(sharded, keys=[]) == {}


def test_a_key_that_is_nowhere_is_named_with_the_files(sharded: Path) -> None:
    with pytest.raises(FormatError, match=FIRST) as caught:
        load(sharded, keys=["a", "lm_head"])
    assert caught.value.tensor == "lm_head"
    assert SECOND in str(caught.value)
    with pytest.raises(TypeError, match="single string"):
        load(sharded, keys="abc")
