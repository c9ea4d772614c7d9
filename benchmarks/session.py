"""One run of a benchmark: its options, its files, its contests, its targets, and the JSON that all of it ends in.

The JSON is written again after every case, so that what was measured survives whatever happens next.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import datetime as dt
import json
import os
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from gpunvme.bench import contest, machine
from gpunvme.bench.contest import Contestant, Kind, Outcome, Row, Run
from gpunvme.bench.report import rate_text
from gpunvme.bench.scratch import random_pieces, roomy_directory
from worker import Worker, WorkerError

MIB, GIB = 1 << 20, 1 << 30
TAKES_NO_PART = "takes no part"


def size(text: str) -> int:
    """Read a size from the command line: ``8GiB``, ``512MiB``, ``4096``."""
    for unit, scale in (("KiB", 1 << 10), ("MiB", MIB), ("GiB", GIB)):
        if text.endswith(unit):
            return int(float(text.removesuffix(unit)) * scale)
    return int(text)


def short(text: str) -> str:
    """Return the beginning of an error's text: some libraries' go on for a page."""
    line = " ".join(text.split())
    return line if len(line) <= 200 else line[:199] + "…"


def options(description: str, *, deadline: float, rounds: int = 3) -> argparse.ArgumentParser:
    """Make the command line that all benchmarks share."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--dir", help="where the files go; by default a temporary directory that is not in memory")
    parser.add_argument("--out", default="", help="the JSON file; by default <benchmark>.json in the current directory")
    parser.add_argument("--rounds", type=int, default=rounds, help="timed runs of each (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="an eighth of the sizes: to see that everything works")
    parser.add_argument("--deadline", type=float, default=deadline, help="seconds after which no case starts")
    parser.add_argument("--keep", action="store_true", help="leave the files for the next run")
    return parser


class Session:
    """What one benchmark measures.

    Parameters
    ----------
    name : str
        The benchmark's name.
    arguments : argparse.Namespace
        The command line.
    """

    def __init__(self, name: str, arguments: argparse.Namespace) -> None:
        self.name = name
        self.rounds = 2 if arguments.quick else arguments.rounds
        self.quick: bool = arguments.quick
        self._out = Path(arguments.out or f"{name}.json")
        self._ends = time.monotonic() + arguments.deadline
        self._keep: bool = arguments.keep
        self._files: list[Path] = []
        self._workers: dict[str, Worker] = {}
        self._started = time.monotonic()
        self._directory = Path(arguments.dir) if arguments.dir else None
        self.result: dict[str, Any] = {
            "schema": 1,
            "benchmark": name,
            "date": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
            "machine": machine.describe_machine(),
            "quick": self.quick,
            "command": " ".join(sys.argv),
            "contestants": {},
            "results": [],
            "targets": [],
        }

    # ---- files

    def directory(self, nbytes: int) -> Path:
        """Return the directory for files of some size together."""
        if self._directory is None:
            self._directory = Path(roomy_directory(nbytes)) / "gpunvme-benchmarks"
        self._directory.mkdir(parents=True, exist_ok=True)
        return self._directory

    def file(self, name: str, nbytes: int) -> str:
        """Return a file of random bytes, made now unless it is still there, removed at the end."""
        path = self.directory(nbytes) / name
        self._files.append(path)
        if not path.exists() or path.stat().st_size != nbytes:
            with path.open("wb") as file:
                for piece in random_pieces(nbytes):
                    file.write(piece)
                os.fsync(file.fileno())
        self.result["file"] = machine.describe_file(str(path))
        return str(path)

    def removed_at_the_end(self, path: Path) -> Path:
        """Remember a file that a case makes."""
        self._files.append(path)
        return path

    # ---- contestants

    def workers(self, wanted: dict[str, tuple[str, dict[str, Any]]], **prepare: Any) -> None:
        """Start contestants' processes, all at the same time, and let each prepare itself.

        Parameters
        ----------
        wanted : dict
            Name to (adapter, settings).
        **prepare
            Arguments of the adapters' ``prepare``; without any it is not called.
        """
        for name, (adapter, settings) in wanted.items():
            self._workers[name] = Worker(adapter, settings)

        def ready(name: str) -> tuple[str, dict[str, Any]]:
            worker = self._workers[name]
            try:
                about = worker.call("about", 180)
                if prepare:
                    worker.call("prepare", 180, **prepare)
            except WorkerError as error:
                return name, {"why_not": short(str(error))}
            return name, about

        with concurrent.futures.ThreadPoolExecutor(len(wanted)) as pool:
            for name, about in pool.map(ready, wanted):
                self.result["contestants"][name] = about
                if about.get("gpu"):
                    self.result["machine"]["gpu"] = about["gpu"]
                if "why_not" in about:
                    self._say(f"{name} {TAKES_NO_PART}: {about['why_not']}")

    def worker(self, name: str) -> Worker:
        """Return a contestant's process."""
        return self._workers[name]

    def contestant(
        self,
        name: str,
        kind: Kind,
        verb: str,
        *,
        worker: str = "",
        check: str = "",
        limit: float = 60.0,
        on_answer: Callable[[dict[str, Any]], None] | None = None,
        **arguments: Any,
    ) -> Contestant:
        """Let a process take part in a contest.

        Parameters
        ----------
        name : str
            What a person calls it.
        kind : {"ours", "peer", "limit"}
            What it is.
        verb : str
            The adapter's method that does it once and answers with ``seconds`` and ``nbytes``.
        worker : str
            The process, if it is called differently.
        check : str
            The adapter's method that compares what arrived with the file, after the first run; ``poison`` is called
            before that run.
        limit : float
            Seconds that one run may take.
        on_answer : callable, optional
            Sees each answer.
        **arguments
            The method's arguments.
        """
        process, seen = worker or name, [False]

        def run() -> Run:
            about = self.result["contestants"].get(process, {})
            if "why_not" in about:
                raise WorkerError(f"{TAKES_NO_PART}: {about['why_not']}")
            called = self._workers[process]
            first = bool(check) and not seen[0]
            if first:
                called.call("poison", 60)
            answer = called.call(verb, limit, **arguments)
            if first:
                called.call(check, 60, **{key: value for key, value in arguments.items() if key in _CHECKED})
                seen[0] = True
            if on_answer is not None:
                on_answer(answer)
            return Run(answer["seconds"], answer["nbytes"], answer.get("path", ""), answer.get("reason", ""))

        settings = str(self.result["contestants"].get(process, {}).get("settings", ""))
        return Contestant(name, kind, run, settings=settings, lands=False)

    # ---- measuring

    def hold(
        self,
        case: str,
        contestants: Iterable[Contestant],
        before: Callable[[], float | None] = lambda: None,
        *,
        block: int = 0,
        warm_up: bool = True,
        seconds: float = 20.0,
        check: contest.Check | None = None,
    ) -> list[Row]:
        """Hold a contest, print it, and keep its rows.

        Parameters
        ----------
        case : str
            What is measured, in words.
        contestants : iterable of Contestant
            Who takes part.
        before : callable
            Brings the page cache into its state.
        block : int
            Bytes of one request, where requests per second are what counts.
        warm_up : bool
            Whether the first run does not count.
        seconds : float
            No further round starts after this long.
        check : Check, optional
            Verifies what contestants in this process deliver; those in processes of their own do it themselves.
        """
        members = list(contestants)
        if time.monotonic() > self._ends:
            outcomes = [Outcome(one, failure="not measured: the deadline of this run has passed") for one in members]
        else:
            outcomes = contest.hold(
                members, before=before, rounds=self.rounds, seconds=seconds, warm_up=warm_up, check=check
            )
        for outcome in outcomes:
            outcome.failure = short(outcome.failure.removeprefix("WorkerError: "))
        rows = [outcome.row(case, block) for outcome in outcomes]
        self.add(rows)
        return rows

    def add(self, rows: list[Row]) -> None:
        """Print rows and keep them."""
        for case in contest.cases(rows):
            self._say(f"\n{case}")
            for row in (row for row in rows if row["case"] == case):
                if row["median"] is None:
                    if not row["failure"].startswith(TAKES_NO_PART):  # said once, when it was found
                        self._say(f"  {row['contestant']:44s} — {row['failure']}")
                    continue
                spread = f"{rate_text(row, row['low'])} … {rate_text(row, row['high'])}"
                first = f"first {rate_text(row, row['first'])}" if row["first"] else ""
                self._say(f"  {row['contestant']:44s} {rate_text(row, row['median']):>13s}  {spread:30s} {first}")
        self.result["results"] += rows
        self._write()

    def target(self, case: str, against: str, at_least: float, *, of_case: str = "", measure: str = "median") -> None:
        """State a target and whether this run met it.

        Parameters
        ----------
        case : str
            The case in which gpunvme's rate counts.
        against : str
            ``"limit"``, ``"peer"`` (the best of them), ``"any"`` (the better of both), or a contestant's name.
        at_least : float
            The ratio to reach.
        of_case : str
            The case in which the other one's rate counts, if it is another.
        measure : str
            ``"median"``, or ``"first"`` for the first call of a process.
        """
        rows, other = self.result["results"], of_case or case
        ours = contest.best(rows, case, "ours")
        rate = ours[measure] if ours else None
        beside, name = self._beside(rows, other, against)
        ratio = rate / beside if rate and beside else None
        self.result["targets"].append(
            {
                "case": case,
                "measure": measure,
                "against": against,
                "contestant": name,
                "of_case": other,
                "at_least": at_least,
                "ratio": ratio,
                "met": None if ratio is None else ratio >= at_least,
            }
        )
        self._write()

    @staticmethod
    def _beside(rows: list[Row], case: str, against: str) -> tuple[float | None, str]:
        kinds: dict[str, tuple[Kind, ...]] = {"limit": ("limit",), "peer": ("peer",), "any": ("limit", "peer")}
        if against in kinds:
            found = [row for kind in kinds[against] if (row := contest.best(rows, case, kind))]
        else:
            found = [r for r in rows if r["case"] == case and r["contestant"] == against and r["median"]]
        best = max(found, key=lambda row: float(row["median"]), default=None)
        return (best["median"], best["contestant"]) if best else (None, "")

    def target_iops(self, case: str, at_least: float) -> None:
        """State an absolute target in requests per second."""
        ours = contest.best(self.result["results"], case, "ours")
        reached = ours["median"] / ours["block"] if ours else None
        self.result["targets"].append(
            {
                "case": case,
                "measure": "median",
                "against": "IOPS",
                "contestant": f"{at_least / 1e6:g} M IOPS",
                "of_case": case,
                "at_least": 1.0,
                "ratio": reached / at_least if reached else None,
                "met": None if reached is None else reached >= at_least,
            }
        )
        self._write()

    def target_peak(self, case: str, peak: int | None, nbytes: int, at_most: float) -> None:
        """State how much memory a load may use at most, as a multiple of the files."""
        ratio = peak / nbytes if peak else None
        self.result["targets"].append(
            {
                "case": case,
                "measure": "peak memory",
                "against": "files",
                "contestant": "the files' size",
                "of_case": case,
                "at_most": at_most,
                "ratio": ratio,
                "met": None if ratio is None else ratio <= at_most,
            }
        )
        self._write()

    # ---- ending

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._workers.values():
            with contextlib.suppress(Exception):
                worker.close()
        if not self._keep:
            for path in self._files:
                path.unlink(missing_ok=True)
            if self._directory is not None and self._directory.name == "gpunvme-benchmarks":
                with contextlib.suppress(OSError):
                    self._directory.rmdir()
        self.result["seconds"] = round(time.monotonic() - self._started, 1)
        self._write()
        self._say("\ntargets")
        for one in self.result["targets"]:
            ratio = "—" if one["ratio"] is None else f"{one['ratio']:.3f}"
            verdict = {True: "met", False: "MISSED", None: "not measured"}[one["met"]]
            bound = f"≥ {one['at_least']:<5g}" if "at_least" in one else f"≤ {one['at_most']:<5g}"
            what = "" if one["measure"] == "median" else f"{one['measure']}, "
            self._say(f"  {verdict:12s} {ratio:>6s} {bound} {what}{one['case']} / {one['contestant']}")
        self._say(f"\n{self.result['seconds']} s, {self._out}")

    def _write(self) -> None:
        half = self._out.with_suffix(".part")
        half.write_text(json.dumps(self.result, indent=1), encoding="utf-8")
        half.replace(self._out)

    @staticmethod
    def _say(line: str) -> None:
        print(line, flush=True)


_CHECKED = {"path", "nbytes", "file_bytes", "block", "count", "seed"}
