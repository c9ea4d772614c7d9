"""`gpunvme pack` and `gpunvme catalog`, run as a user runs them."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import files
import gpunvme
from gpunvme.cli import main
from gpunvme.cli.exits import Exit

if TYPE_CHECKING:
    from pathlib import Path

TENSORS = {
    "a.weight": np.random.default_rng(0).standard_normal((70, 30)).astype(np.float32),
    "b": np.arange(9),
    "empty": np.zeros((0, 2), np.float16),
    "scalar": np.array(1.5),
}


@pytest.fixture
def model(tmp_path: Path) -> str:
    gpunvme.save_file(TENSORS, tmp_path / "model.safetensors")
    return str(tmp_path / "model.safetensors")


@pytest.fixture
def target(tmp_path: Path) -> str:
    return str(tmp_path / "catalog")


def answer(capsys: pytest.CaptureFixture[str]) -> Any:
    told = capsys.readouterr()
    assert told.err == ""
    return json.loads(told.out)


def test_pack_and_list(model: str, target: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pack", model, target, "--json"]) == Exit.OK
    packed = answer(capsys)
    assert packed["nbytes"] == sum(array.nbytes for array in TENSORS.values())
    assert main(["catalog", "ls", target, "--json"]) == Exit.OK
    listed = answer(capsys)
    assert listed["regions"] == packed["regions"]
    by_name = {region["name"]: region for region in listed["regions"]}
    assert by_name.keys() == TENSORS.keys()
    assert (by_name["a.weight"]["dtype"], by_name["a.weight"]["shape"]) == ("F32", [70, 30])
    assert main(["catalog", "ls", target]) == Exit.OK
    assert "a.weight  F32 [70, 30], 8.2 KiB" in capsys.readouterr().out
    with gpunvme.Catalog(target) as catalog:
        loaded = catalog.load(framework="np")
    assert all(np.array_equal(loaded[name], array) for name, array in TENSORS.items())


def test_pack_again(model: str, target: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with gpunvme.Catalog.create(target) as catalog:
        catalog.add(40, b"mine", name="mine")
    assert main(["pack", model, target]) == Exit.OK
    before = capsys.readouterr()
    assert "4 tensors" in before.out
    assert main(["pack", model, target]) == Exit.BAD_INPUT
    assert "names are there already, the first is" in capsys.readouterr().err
    with gpunvme.Catalog(target) as catalog:
        numbers = {region.name: region.kind for region in catalog}
    gpunvme.save_file({"b": np.arange(4)}, tmp_path / "other.safetensors")
    assert main(["pack", str(tmp_path / "other.safetensors"), target, "--replace"]) == Exit.OK
    with gpunvme.Catalog(target) as catalog:
        assert {region.name: region.kind for region in catalog} == numbers
        assert catalog.load(framework="np")["b"].tolist() == [0, 1, 2, 3]
    assert main(["pack", str(tmp_path / "other.safetensors"), target, "--only"]) == Exit.OK
    with gpunvme.Catalog(target) as catalog:
        assert [region.name for region in catalog] == ["b"]


def test_shards(tmp_path: Path, target: str) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    names = list(TENSORS)
    for number, name in enumerate(names, 1):
        gpunvme.save_file({name: TENSORS[name]}, folder / f"m-{number:05}-of-{len(names):05}.safetensors")
    assert main(["pack", str(folder), target]) == Exit.OK
    with gpunvme.Catalog(target) as catalog:
        assert set(catalog.load(framework="np")) == TENSORS.keys()


def test_memory_is_bounded(tmp_path: Path, target: str) -> None:
    gpunvme.save_file({"large": np.zeros(64 << 20, np.uint8)}, tmp_path / "large.safetensors")
    program = """
import resource, sys
import gpunvme.catalog
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
gpunvme.catalog.pack(sys.argv[1], sys.argv[2])
gpunvme.Catalog(sys.argv[2]).verify()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    assert int(files.output(program, tmp_path / "large.safetensors", target)) < 48 << 10


def test_verify_and_remove(model: str, target: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pack", model, target]) == Exit.OK
    assert main(["catalog", "verify", target]) == Exit.OK
    with gpunvme.Catalog(target) as catalog:
        region = catalog["a.weight"]
    with open(target, "r+b") as raw:
        raw.seek(region.offset)
        raw.write(b"!")
    capsys.readouterr()
    assert main(["catalog", "verify", target]) == Exit.CHECK_FAILED
    assert f"1 of 4 regions of {target} are damaged: kind {region.kind} ('a.weight') at" in capsys.readouterr().err
    assert main(["catalog", "verify", target, "b", "scalar", "--json"]) == Exit.OK
    assert answer(capsys)["regions"] == 2
    assert main(["catalog", "rm", target, "b", f"#{region.kind}", "b"]) == Exit.OK
    with gpunvme.Catalog(target) as catalog:
        assert {each.name for each in catalog} == {"empty", "scalar"}
    capsys.readouterr()
    assert main(["catalog", "rm", target, "scalar", "nothing"]) == Exit.BAD_INPUT
    assert "there is no region 'nothing'" in capsys.readouterr().err
    with gpunvme.Catalog(target) as catalog:
        assert "scalar" in catalog


def test_what_is_no_catalog_is_left_alone(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "data"
    data = files.make(path, 100_000)
    assert main(["pack", model, str(path)]) == Exit.UNSAFE
    assert "it would be lost" in capsys.readouterr().err
    assert main(["catalog", "ls", str(path), "--json"]) == Exit.BAD_INPUT
    error = json.loads(capsys.readouterr().out)["error"]
    assert (error["type"], error["offset"], error["filename"]) == ("NoCatalogError", 0, str(path))
    assert main(["catalog", "rm", str(path), "1"]) == Exit.BAD_INPUT
    assert path.read_bytes() == data
    assert main(["pack", model, str(path), "--overwrite", str(path)]) == Exit.OK


def test_a_broken_checkpoint_writes_nothing(tmp_path: Path, target: str) -> None:
    (tmp_path / "broken.safetensors").write_bytes(b"no checkpoint")
    assert main(["pack", str(tmp_path / "broken.safetensors"), target]) == Exit.BAD_INPUT
    assert not os.path.exists(target)


def test_namespaces(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    uri = f"nvme+soft:{tmp_path}/disk?size=8MiB&lba=4096"
    assert main(["pack", model, uri]) == Exit.OK
    assert main(["catalog", "verify", uri]) == Exit.OK
    assert "4 regions are as they were written" in capsys.readouterr().out
