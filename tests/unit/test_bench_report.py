"""A figure without its machine, its ratio and its losses tells a reader nothing, or worse."""

from __future__ import annotations

import io
from typing import Any

from rich.console import Console

from gpunvme.bench import report


def row(contestant: str, kind: str, median: float | None, **changed: Any) -> dict[str, Any]:
    return {
        "case": "sequential, 1 GiB at a time, hot",
        "contestant": contestant,
        "kind": kind,
        "settings": "",
        "block": 1 << 30,
        "nbytes": 1 << 30,
        "median": median,
        "low": median,
        "high": median,
        "first": median,
        "rounds": 3,
        "resident_before": 1.0,
        "path": "",
        "reason": "",
        "failure": "",
    } | changed


def rendered(rows: list[dict[str, Any]], **changed: Any) -> str:
    result = {
        "machine": {
            "processor": "Some CPU",
            "cpus": 2,
            "memory_bytes": 8 << 30,
            "kernel": "6.18",
            "system": "Linux",
            "gpu": "Some GPU",
        },
        "device": "cuda:0",
        "file": {"name": "weights.bin", "nbytes": 3 << 29, "filesystem": "ext4", "source": "/dev/vda", "drive": "QD1"},
        "versions": {"gpunvme": "0.1.0", "fio": None},
        "results": rows,
    } | changed
    text = io.StringIO()
    report.render(result, Console(file=text, width=140))
    return text.getvalue()


def test_each_rate_stands_beside_the_limit_and_the_best_peer() -> None:
    text = rendered([row("gpunvme", "ours", 45e9), row("pread", "peer", 30e9), row("page-locked", "limit", 50e9)])
    (ours,) = [line for line in text.splitlines() if line.strip().startswith("gpunvme  ")]
    assert "45 GB/s" in ours
    assert "0.90×" in ours
    assert "1.50×" in ours


def test_machine_file_and_versions_come_first() -> None:
    head = rendered([row("gpunvme", "ours", 1e9)])[:400]
    for expected in ("Some CPU, 2 CPUs, 8 GiB", "Some GPU", "weights.bin: 1.5 GiB, ext4 on QD1", "gpunvme 0.1.0"):
        assert expected in head
    assert "fio is not installed" in head


def test_a_failure_is_shown_with_its_reason_and_beside_nobody_is_a_ratio_made_up() -> None:
    text = rendered([row("gpunvme", "ours", 1e9), row("a [peer]", "peer", None, failure="RuntimeError: [boom]")])
    assert "a [peer]" in text
    assert "RuntimeError: [boom]" in text
    (ours,) = [line for line in text.splitlines() if line.strip().startswith("gpunvme  ")]
    assert ours.count("—") == 2


def test_a_case_that_could_not_be_measured_says_why() -> None:
    text = rendered([row("gpunvme", "ours", None, failure="not measured: tmpfs lives in memory")])
    assert "tmpfs lives in memory" in text


def test_small_random_reads_are_told_in_requests() -> None:
    small = row("gpunvme", "ours", 4096 * 1.57e6, case="random, 4 KiB, hot", block=4096)
    assert report.rate_text(small, small["median"]) == "1.57 M IOPS"
    assert report.rate_text(small, 4096 * 45e3) == "45 k IOPS"
    large = row("gpunvme", "ours", 3e9, case="random, 1 MiB, hot", block=1 << 20)
    assert report.rate_text(large, 3e9) == "3 GB/s"


def test_which_path_carried_the_bytes_is_told() -> None:
    assert "host: all from the page cache" in rendered(
        [row("gpunvme", "ours", 1e9, path="host", reason="all from the page cache")]
    )
