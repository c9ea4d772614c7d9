"""``gpunvme demo --gpu``: NVMe queues that a GPU's kernels drive, on a software controller, with no NVMe hardware."""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import numpy as np
from rich.box import SIMPLE
from rich.table import Table

from gpunvme.cli.exits import CheckFailedError
from gpunvme.cli.output import Output, size, speed

if TYPE_CHECKING:
    from collections.abc import Callable

    from gpunvme.nvme import Namespace

IMAGE_BYTES = 256 << 20
BLOCK = 4096
ROWS = 200_000  # of a gather at full depth
ROWS_ALONE = 4_000  # of one that has a command or two in flight
ROUNDS = 3
CONTROLLER_QUEUES = 16
# (queues, entries of each): from one command at a time to as many as the package makes.
SHAPES = ((1, 2), (1, 32), (1, 256), (8, 256))
TIERS = {
    "host": "queues and data in host memory",
    "data": "data in GPU memory",
    "full": "queues and data in GPU memory",
}


def demonstrate(output: Output, device: str) -> None:
    """Show what GPU queues do on this machine.

    Parameters
    ----------
    output
        Where results go.
    device
        ``cuda:N``.

    Raises
    ------
    CudaError
        CUDA cannot be used, or the kernels can neither be loaded nor compiled.
    CheckFailedError
        A kernel brought other bytes than the image has.
    """
    from gpunvme import nvme

    threads = max(1, min(8, (os.cpu_count() or 2) // 2))
    with tempfile.TemporaryDirectory(prefix="gpunvme-demo-") as directory:
        image = Path(directory) / "image"
        with output.status("making an image") as show:
            show(size(IMAGE_BYTES))
            data = np.random.default_rng(0).integers(0, 256, IMAGE_BYTES, np.uint8)
            data.tofile(image)
        uri = f"soft:{quote(str(image))}?lba={BLOCK}&threads={threads}&queues={CONTROLLER_QUEUES}"
        with nvme.open(uri, queues=4) as controller, output.status("measuring") as show:
            found = _measure(controller.namespace(), image, data, device, show)
    output.document(found)
    if not output.as_json:
        _print(output, found, threads)


def _measure(
    namespace: Namespace, image: Path, data: np.ndarray[Any, Any], device: str, show: Callable[[str], None]
) -> dict[str, Any]:
    found: dict[str, Any] = {"device": device, "nbytes": IMAGE_BYTES, "block": BLOCK}
    gathers = []
    for count, depth in SHAPES:
        show(f"{count} queues of {depth}")
        with namespace.gpu_queues(device, count=count, depth=depth) as queues:
            gathers.append(_gather(queues, data, ROWS if depth * count > 32 else ROWS_ALONE))
            if (count, depth) == SHAPES[-1]:
                found |= {
                    "placement": queues.placement,
                    "tiers": {tier: queues.reasons.get(tier, "not tried") for tier in TIERS},
                    "doorbell": queues.doorbell,
                    "doorbell_reason": queues.doorbell_reason,
                }
                show("in order")
                found["in_order"] = _in_order(queues, image, data)
    return found | {"gathers": gathers}


def _gather(queues: Any, data: np.ndarray[Any, Any], rows: int) -> dict[str, Any]:
    """Gather rows at random: checked once, then timed."""
    from gpunvme.memory import Buffer

    lbas = np.random.default_rng(rows).integers(0, IMAGE_BYTES // BLOCK, rows)
    out = Buffer.empty(rows * BLOCK, queues.device)
    queues.gather(lbas, out)
    if not np.array_equal(out.numpy().reshape(rows, BLOCK), data.reshape(-1, BLOCK)[lbas]):
        raise CheckFailedError(f"{queues.count} queues of {queues.depth}: gathered rows are not those of the image")
    seconds = statistics.median(_timed(lambda: queues.gather(lbas, out)) for _ in range(ROUNDS))
    return {"queues": queues.count, "depth": queues.depth, "rows": rows, "iops": rows / seconds, "verified": rows}


def _in_order(queues: Any, image: Path, data: np.ndarray[Any, Any]) -> list[dict[str, Any]]:
    """Read the whole image by every way that there is here, in turns, each checked once."""
    import gpunvme
    from gpunvme.memory import Buffer

    out = Buffer.empty(IMAGE_BYTES, queues.device)
    with gpunvme.open(image) as file:
        ways: dict[str, tuple[str, Callable[[], Any]]] = {
            "gpu-nvme": ("kernels on the GPU drive the controller", lambda: queues.stream(0, IMAGE_BYTES, out)),
            "nvme": ("the CPU drives the controller", lambda: queues.namespace.read_into(out)),
            "host": ("no controller: the same file by the engine", lambda: file.read_into(out)),
        }
        times: dict[str, list[float]] = {name: [] for name in ways}
        for turn in range(ROUNDS + 1):
            for name, (_, read) in ways.items():
                seconds = _timed(read)
                if turn:
                    times[name].append(seconds)
                elif not np.array_equal(out.numpy(), data):
                    raise CheckFailedError(f"{name}: what was read is not the image")
    return [
        {"path": name, "what": what, "seconds": statistics.median(times[name]), "verified": IMAGE_BYTES}
        for name, (what, _) in ways.items()
    ]


def _timed(move: Callable[[], Any]) -> float:
    start = time.perf_counter()
    move()
    return time.perf_counter() - start


def _print(output: Output, found: dict[str, Any], threads: int) -> None:
    output.line(
        f"A software NVMe controller in {threads} threads of this process, on an image of {size(found['nbytes'])} in "
        f"the page cache; queues driven by kernels on {found['device']}."
    )
    tiers = Table(title="Placements", title_justify="left", box=SIMPLE, pad_edge=False)
    for column in ("tier", "placement", "", "used", "why"):
        tiers.add_column(column, overflow="fold")
    for number, (tier, what) in enumerate(TIERS.items(), 1):
        used = "yes" if tier == found["placement"] else "no"
        tiers.add_row(str(number), tier, what, used, found["tiers"][tier])
    output.console.print(tiers)
    output.line(f"Doorbells: {found['doorbell']}, {found['doorbell_reason']}")
    output.line()
    gathers = Table(title="Random 4 KiB to GPU memory", title_justify="left", box=SIMPLE, pad_edge=False)
    for column in ("queues", "entries of each", "rows", "IOPS"):
        gathers.add_column(column, justify="right")
    for row in found["gathers"]:
        gathers.add_row(str(row["queues"]), str(row["depth"]), f"{row['rows']:,}", f"{row['iops']:,.0f}")
    output.console.print(gathers)
    order = Table(title="The whole image to GPU memory", title_justify="left", box=SIMPLE, pad_edge=False)
    for column in ("path", "", "median", "speed"):
        order.add_column(column)
    for row in found["in_order"]:
        milliseconds = f"{row['seconds'] * 1e3:.0f} ms"
        order.add_row(row["path"], row["what"], milliseconds, speed(found["nbytes"], row["seconds"]))
    output.console.print(order)
    output.line("Every row, and the image by every path, was compared bit by bit with what was written.")
    output.line(
        f"Medians of {ROUNDS}. This measures the protocol and the way to GPU memory, with the controller's threads on "
        "the same CPU; it says nothing of a drive.",
        style="dim",
    )
