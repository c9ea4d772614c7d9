"""`gpunvme bench` runs on people's own files and machines: it must leave both as they were, and say what it did."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import gpunvme
from gpunvme.bench import cases, fio, report, run_bench, scratch

MIB = 1 << 20


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cases, "QUICK", cases.Scale(2, 0.5, 8 * MIB, 8 * MIB, MIB, MIB // 4, 0.1))
    monkeypatch.setattr(fio, "version", lambda: None)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "weights.bin"
    path.write_bytes(b"".join(scratch.random_pieces(9 * MIB + 123)))
    return path


def excused(row: dict[str, Any]) -> bool:
    """Whether a row may lack its figure: some file systems cannot be cold, some know no O_DIRECT."""
    return "lives in memory" in row["failure"] or "page cache" in row["failure"] or row["kind"] == "limit"


def test_a_run_measures_every_case_and_leaves_the_file_and_its_directory_as_they_were(file: Path) -> None:
    before = file.read_bytes()
    seen: list[dict[str, Any]] = []
    result = run_bench(str(file), device="cpu", quick=True, write=True, on_result=seen.append)
    assert file.read_bytes() == before
    assert os.listdir(file.parent) == [file.name]
    assert json.loads(json.dumps(result)) == result
    assert result["results"] == seen
    assert not [row["failure"] for row in seen if row["failure"] and not excused(row)]
    ours = [row for row in seen if row["kind"] == "ours" and row["median"]]
    assert {row["path"] for row in ours} == {"host"}
    assert {"hot", "drive"} <= {str(row["case"]).split()[-1] for row in ours}
    for kind in ("peer", "limit"):
        assert any(row["kind"] == kind and row["median"] for row in seen)
    for expected in ("processor", "kernel", "cpus"):
        assert result["machine"][expected]
    text = io.StringIO()
    report.render(result, Console(file=text, width=120))
    assert "× best peer" in text.getvalue()


def test_without_a_file_a_temporary_one_is_made_and_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scratch, "roomy_directory", lambda nbytes: str(tmp_path))
    monkeypatch.setattr("gpunvme.bench._suitable_size", lambda scale: 4 * MIB)
    during: list[list[str]] = []
    result = run_bench(None, device="cpu", quick=True, on_result=lambda row: during.append(os.listdir(tmp_path)))
    assert all(during)
    assert result["file"]["nbytes"] == 4 * MIB
    assert os.listdir(tmp_path) == []


def test_a_temporary_file_is_removed_when_the_run_is_interrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scratch, "roomy_directory", lambda nbytes: str(tmp_path))
    monkeypatch.setattr("gpunvme.bench._suitable_size", lambda scale: 4 * MIB)

    def interrupt(row: dict[str, Any]) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_bench(None, device="cpu", quick=True, on_result=interrupt)
    assert os.listdir(tmp_path) == []


def test_a_small_file_is_measured_as_far_as_it_goes(tmp_path: Path) -> None:
    path = tmp_path / "small"
    path.write_bytes(os.urandom(10_000))
    result = run_bench(str(path), device="cpu", quick=True)
    assert any(row["median"] for row in result["results"] if row["kind"] == "ours")
    skipped = [row for row in result["results"] if row["median"] is None and not excused(row)]
    assert all(row["failure"].startswith("not measured: the file is too small") for row in skipped), skipped


def test_an_empty_file_is_refused_in_words(tmp_path: Path) -> None:
    path = tmp_path / "empty"
    path.touch()
    with pytest.raises(OSError, match="empty"):
        run_bench(str(path), device="cpu")


def test_sizes_are_the_ones_that_were_asked_for(file: Path) -> None:
    result = run_bench(str(file), device="cpu", sizes=[64 << 10, MIB], quick=True)
    sequential = {row["block"] for row in result["results"] if "at a time" in row["case"]}
    assert sequential == {64 << 10, MIB}


def test_a_gpu_that_is_not_there_is_an_error_and_not_a_figure_of_the_host(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "gpunvme.bench.destinations._native.cuda_unavailable_reason", lambda: "libcuda.so.1 is not installed"
    )
    with pytest.raises(gpunvme.CudaError, match=r"libcuda\.so\.1 is not installed"):
        run_bench(str(file), device="cuda:0")
    assert run_bench(str(file), device="auto", sizes=[MIB], quick=True)["device"] == "cpu"


def test_offsets_are_aligned_inside_the_file_and_the_same_for_everybody() -> None:
    from gpunvme.bench.contestants import random_offsets

    offsets = random_offsets(10 * 4096 + 100, 4096, 1000)
    assert offsets.min() >= 0
    assert offsets.max() == 9 * 4096
    assert not (offsets % 4096).any()
    assert (offsets == random_offsets(10 * 4096 + 100, 4096, 1000)).all()


def test_random_bytes_do_not_repeat_from_page_to_page() -> None:
    held = b"".join(scratch.random_pieces(40 * MIB))
    assert len(held) == 40 * MIB
    pages = {held[at : at + 4096] for at in range(0, len(held), 4096)}
    assert len(pages) == len(held) // 4096
