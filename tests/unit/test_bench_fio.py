"""fio is the yardstick people trust: it must read what we read, from the same state, and never write."""

from __future__ import annotations

import json

import pytest

from gpunvme.bench import fio

JOB = fio.Job("/data/a:b", 1 << 30, 4096, random=True, engine="io_uring", depth=64, seconds=1.5)


def answer(**changed: object) -> str:
    read = {"io_bytes": 8_192_000, "bw_bytes": 4_096_000, "runtime": 2000, "iops": 1000.0}
    return json.dumps({"fio version": "fio-3.33", "jobs": [{"error": 0, "read": read | changed}]})


def test_the_rate_is_the_one_that_fio_counted() -> None:
    run = fio.parse(answer())
    assert run.nbytes / run.seconds == 4_096_000


def test_warnings_before_the_json_do_not_cost_the_figure() -> None:
    assert fio.parse("note: both iodepth >= 1 and synchronous I/O engine\n" + answer()).nbytes == 8_192_000


@pytest.mark.parametrize("text", ["", "fio: broken", "{}", '{"jobs": []}', answer(io_bytes=0), answer(runtime=0)])
def test_an_answer_without_a_measurement_is_no_rate(text: str) -> None:
    with pytest.raises(fio.FioError):
        fio.parse(text)


def test_an_error_inside_fio_is_no_rate() -> None:
    with pytest.raises(fio.FioError, match="error 5"):
        fio.parse(json.dumps({"jobs": [{"error": 5, "read": {"io_bytes": 1, "bw_bytes": 1, "runtime": 1}}]}))


def test_fio_never_writes_and_leaves_the_page_cache_as_the_case_prepared_it() -> None:
    arguments = JOB.arguments()
    assert "--readonly" in arguments
    assert "--invalidate=0" in arguments
    assert "--rw=randread" in arguments
    assert "--direct=1" in arguments


def test_a_colon_in_a_name_is_not_a_list_of_files() -> None:
    assert r"--filename=/data/a\:b" in JOB.arguments()


def test_sequential_threads_share_the_file_instead_of_reading_it_several_times() -> None:
    job = fio.Job("f", 64 << 20, 1 << 20, random=False, engine="psync", jobs=4)
    assert f"--size={16 << 20}" in job.arguments()
    assert f"--offset_increment={16 << 20}" in job.arguments()
    assert "--direct=0" in job.arguments()


def test_without_fio_the_rest_is_still_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    assert fio.version() is None
    with pytest.raises(fio.FioError, match="not installed"):
        fio.run(JOB)
