"""What ``gpunvme bench`` measures: this library, what people use today, and the limit, in one run."""

from __future__ import annotations

import contextlib
import datetime as dt
import os
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import gpunvme
from gpunvme.bench import cases, contest, fio, latency, machine, sweep
from gpunvme.bench.contest import Row
from gpunvme.bench.destinations import destination, gpu_name, resolve_device
from gpunvme.bench.scratch import remove_quietly, temporary_file

__all__ = ["run_bench"]

_MIB = 1 << 20
_DEFAULT_SIZES = (_MIB, 16 * _MIB, 256 * _MIB)
_QUICK_SIZES = (_MIB,)


def run_bench(
    path: str | None,
    *,
    device: str = "auto",
    sizes: list[int] | None = None,
    write: bool = False,
    quick: bool = False,
    latency_seconds: float | None = None,
    sweep_seconds: float | None = None,
    on_result: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Measure reading a file: with gpunvme, the ways people read files today, and the limit of the machine.

    The file is only read. Its cached pages are dropped for the cold cases.

    Parameters
    ----------
    path : str or None
        The file. None makes a temporary one and removes it.
    device : str
        Where the bytes go: ``"auto"`` (the first GPU, else host memory), ``"cpu"``, ``"cuda"`` or ``"cuda:N"``.
    sizes : list of int, optional
        Bytes of the sequential requests. By default a range from 1 MiB to the whole file.
    write : bool
        Whether to measure writing too, into a temporary file beside ``path``.
    quick : bool
        Fewer rounds and smaller reads: well under a minute.
    latency_seconds : float, optional
        Time single requests too, for about so long; see `latency.measure`.
    sweep_seconds : float, optional
        Measure by size and depth too, for about so long; see `sweep.measure`.
    on_result : callable, optional
        Called with each row as soon as it is known.

    Returns
    -------
    dict
        JSON-able: ``schema``, ``date``, ``machine``, ``device``, ``file``, ``versions``, ``results`` (rows) and
        ``limits`` (per case, the best rate of the limit and of the peers, bytes per second); ``latency`` and
        ``sweep`` where they were asked for.

    Raises
    ------
    gpunvme.CudaError
        If a GPU is asked for and there is none.
    OSError
        If the file cannot be read, or there is no room for a temporary one.
    """
    scale = cases.QUICK if quick else cases.FULL
    where = resolve_device(device)
    with contextlib.ExitStack() as cleanup:
        if path is None:
            path = cleanup.enter_context(temporary_file(_suitable_size(scale)))
        nbytes = os.stat(path).st_size or _block_device_size(path)
        if nbytes == 0:
            raise OSError(f"{path!r} is empty: there is nothing to read")
        room = min(nbytes, scale.largest, max(64 * _MIB, machine.memory_bytes("MemAvailable") // 4))
        to = destination(where, max(room, min(nbytes, scale.hot_random)))
        cleanup.callback(to.close)
        host = cases.host_buffer(to, min(max(scale.cold, scale.cold_random), to.nbytes))
        if host is not to:
            cleanup.callback(host.close)
        subject = cases.Subject(path, nbytes, to, host, with_fio=fio.version() is not None)
        rows: list[Row] = []
        for case_rows in _measure(subject, _sizes(sizes, room, quick), scale, write, cleanup):
            rows += case_rows
            for row in case_rows if on_result is not None else []:
                on_result(row)  # type: ignore[misc]
        result = _about(path, where, nbytes)
        if latency_seconds is not None:
            result["latency"] = latency.measure(subject, latency_seconds)
        if sweep_seconds is not None:
            result["sweep"] = sweep.measure(subject, sweep_seconds, on_result=on_result)
    result["results"] = rows
    result["limits"] = {
        name: {"limit": _rate(rows, name, "limit"), "best_peer": _rate(rows, name, "peer")}
        for name in contest.cases(rows)
    }
    return result


def _measure(
    subject: cases.Subject, sizes: list[int], scale: cases.Scale, write: bool, cleanup: contextlib.ExitStack
) -> Iterator[list[Row]]:
    """Yield the rows of one case after the other."""
    with contextlib.ExitStack() as keep:
        for case in cases.reading(subject, sizes, scale, keep):
            yield _hold(case, scale)
            keep.close()
    if write:
        name = ""
        if os.path.isfile(subject.path):
            folder = os.path.dirname(os.path.abspath(subject.path))
            handle, name = tempfile.mkstemp(prefix=".gpunvme-bench-", dir=folder)
            os.close(handle)
            cleanup.callback(remove_quietly, name)
        yield _hold(cases.write(subject, name, scale), scale)


def _hold(case: cases.Case, scale: cases.Scale) -> list[Row]:
    if case.why_not:
        nobody = contest.Contestant("gpunvme", "ours", lambda: contest.Run(0, 0))
        return [contest.Outcome(nobody, failure=f"not measured: {case.why_not}").row(case.name, case.block)]
    outcomes = contest.hold(
        case.contestants,
        before=case.before,
        rounds=scale.rounds,
        seconds=scale.seconds,
        warm_up=case.warm_up,
        check=case.check,
    )
    return [outcome.row(case.name, case.block) for outcome in outcomes]


def _rate(rows: list[Row], case: str, kind: contest.Kind) -> float | None:
    row = contest.best(rows, case, kind)
    return None if row is None else float(row["median"])


def _sizes(asked: list[int] | None, largest: int, quick: bool) -> list[int]:
    if asked is not None:
        return [size for size in dict.fromkeys(asked) if 0 < size <= largest] or [largest]
    return sorted({size for size in (_QUICK_SIZES if quick else _DEFAULT_SIZES) if size < largest} | {largest})


def _about(path: str, where: str, nbytes: int) -> dict[str, Any]:
    about: dict[str, Any] = {
        "schema": 1,
        "benchmark": "gpunvme bench",
        "date": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        "machine": machine.describe_machine(),
        "device": where,
        "file": machine.describe_file(path) | {"nbytes": nbytes},
        "versions": {"gpunvme": gpunvme.__version__, **machine.versions(("numpy", "torch")), "fio": fio.version()},
    }
    if where != "cpu":
        about["machine"]["gpu"] = gpu_name(where)
    return about


def _block_device_size(path: str) -> int:
    with gpunvme.open(path) as file:
        return file.size


def _suitable_size(scale: cases.Scale) -> int:
    """Choose a temporary file's size: large enough to say something, small enough to stay in the page cache."""
    available = machine.memory_bytes("MemAvailable") or 4 * scale.largest
    return max(64 * _MIB, min(scale.largest, available // 4) // _MIB * _MIB)
