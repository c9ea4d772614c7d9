"""What is said of a transfer by cuFile: counted bytes, the evidence, and why in words."""

from __future__ import annotations

from collections.abc import Sequence

from gpunvme.cufile.driver import Driver
from gpunvme.cufile.evidence import COMPAT, Evidence
from gpunvme.cufile.requests import Counted
from gpunvme.transfer import Report, format_bytes


def report(
    path: str,
    seconds: float,
    counted: Counted,
    edges: Report | None,
    *,
    shown: Evidence | None,
    over: bool,
    asked: int,
    how: str,
    driver: Driver,
    notes: Sequence[str],
) -> Report:
    """Say what was done so far.

    Parameters
    ----------
    path
        Its name where no evidence gives another.
    seconds
        How long it took, or has taken.
    counted
        What cuFile moved.
    edges
        What the host path moved of it, None: nothing.
    shown
        The evidence, once there is any.
    over
        Whether it is at its end.
    asked
        Bytes that were asked for.
    how
        In which ways the requests were made.
    driver
        The driver that carried them.
    notes
        What else there is to say.
    """
    cached = 0 if edges is None else edges.moved_bytes - edges.direct_bytes
    moved = counted.direct_bytes + counted.buffered_bytes
    through_host = moved if shown is None or shown.path == COMPAT else counted.edge_bytes
    return Report(
        path if shown is None else shown.path,
        _reason(counted, edges, shown, over, how, driver, notes) if asked else "nothing was moved",
        seconds,
        counted.direct_bytes + (0 if edges is None else edges.direct_bytes),
        cached,
        counted.buffered_bytes,
        through_host + (0 if edges is None else edges.bounced_bytes),
    )


def _reason(
    counted: Counted,
    edges: Report | None,
    shown: Evidence | None,
    over: bool,
    how: str,
    driver: Driver,
    notes: Sequence[str],
) -> str:
    said = []
    requests = counted.bodies + counted.edges
    for nbytes, kind in ((counted.direct_bytes, "O_DIRECT"), (counted.buffered_bytes, "without O_DIRECT")):
        if nbytes:
            said.append(f"{format_bytes(nbytes)} {kind}")
    if said:
        said[-1] += f" in {requests} request{'s' if requests != 1 else ''} {how} ({driver})"
    if edges is not None:
        said.append(f"{format_bytes(edges.moved_bytes)} of head and tail by host")
    if shown is not None:
        said.append(shown.reason)
    elif not over:
        said.append("which way they go is known at the end")
    return ", ".join([*said, *notes]) or "nothing was moved"
