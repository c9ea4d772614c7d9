"""Which way the bytes of a transfer went: what cuFile counted meanwhile, held against what the kernel says.

libcufile counts each GPU's reads and writes by the way that they went (level 3 of its statistics, 1.15 and later). The
counters are the process's, so a transfer looks at them before and after. What is not shown is not claimed: a transfer
that cannot be shown to have gone past host memory is reported as compatibility mode, with the reason.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass

import numpy as np

from gpunvme.cufile import facts, library
from gpunvme.cufile.cuda import Context
from gpunvme.cufile.driver import Driver
from gpunvme.errors import Error

NVIDIA_FS, P2PDMA, COMPAT = "cufile/nvidia-fs", "cufile/p2pdma", "cufile/compat"
# Room for the statistics of a library that knows more than any bindings: they are 5112 bytes in cuFile 1.20.
_ROOM = 64 << 10
# CUfilePerGpuStats_t, from cuFile 1.15 on.
_READS = ("bytes", "rate", "utilization", "us", "total", "p2p", "nvfs", "posix", "unaligned", "routed")
_FIELDS = (
    *(f"reads_{name}" for name in (*_READS, "sparse", "inline", "errors")),
    *(f"writes_{name}" for name in (*_READS, "errors")),
    *("mappings", "mapped", "unmappable", "unmapped", "registered"),
)
_GPU = np.dtype([("uuid", "V16"), *((name, "<u8") for name in _FIELDS)])


@dataclass(frozen=True, slots=True)
class Counts:
    """Requests of one GPU and one direction, by the way that they went."""

    total: int
    nvidia_fs: int
    p2pdma: int
    posix: int
    unaligned: int
    routed: int

    def since(self, before: Counts) -> Counts:
        """What was counted since."""
        return Counts(*(getattr(self, name) - getattr(before, name) for name in Counts.__slots__))


@dataclass(frozen=True, slots=True)
class Statistics:
    """A snapshot: counts of reads and of writes."""

    reads: Counts
    writes: Counts


@dataclass(frozen=True, slots=True)
class Evidence:
    """What is shown: the path's name, whether it is shown or only not disproved, and why in words."""

    path: str
    proven: bool
    reason: str


def statistics(uuid: bytes) -> Statistics | str:
    """Counters of a GPU, or why there are none.

    What stands before the GPUs in CUfileStatsLevel3_t grew between cuFile 1.15 and 1.20, and bindings know one layout
    only: what they hand out for another version is shifted. So a GPU is found by its UUID.
    """
    room = np.zeros(_ROOM, np.uint8)
    try:
        library.call("get_stats_l3", room.ctypes.data)
    except Error as error:
        return f"cuFile's statistics cannot be read ({error})"
    raw = room.tobytes()
    at = raw.find(uuid) if any(uuid) else -1
    if not 0 <= at <= _ROOM - _GPU.itemsize:
        return "cuFile's statistics do not have this GPU's UUID"
    one = np.frombuffer(raw, _GPU, 1, at)[0]

    def counts(direction: str) -> Counts:
        names = ("total", "nvfs", "p2p", "posix", "unaligned", "routed")
        return Counts(*(int(one[f"{direction}_{name}"]) for name in names))

    return Statistics(counts("reads"), counts("writes"))


class Witness:
    """Looks at the counters before a transfer and after it.

    Parameters
    ----------
    driver
        The open driver.
    context
        The GPU whose memory moves.
    write
        Which direction.
    """

    def __init__(self, driver: Driver, context: Context, write: bool) -> None:
        self._driver = driver
        self._context = context
        self._write = write
        self.shared = _enter(self)
        self._kernel = facts.nvidia_fs_counts()
        self._before = self._look()

    def _look(self) -> Statistics | str:
        return self._driver.no_statistics or statistics(self._context.uuid)

    def leave(self) -> None:
        """It looks no more."""
        _leave(self)

    def testify(self, bodies: int, edges: int, place: str) -> Evidence:
        """Say what is shown, after a transfer of so many aligned and unaligned requests."""
        after = self._look()
        _leave(self)
        kernel, before = facts.nvidia_fs_counts(), self._before
        if isinstance(after, str) or isinstance(before, str):
            why = after if isinstance(after, str) else str(before)
            return Evidence(COMPAT, False, f"nothing shows that the bytes went past host memory: {why}")
        counted = after.writes.since(before.writes) if self._write else after.reads.since(before.reads)
        rose = None
        if kernel is not None and self._kernel is not None and kernel.counting:
            rose = kernel.writes - self._kernel.writes if self._write else kernel.reads - self._kernel.reads
        return judge(
            counted,
            bodies,
            edges,
            shared=self.shared,
            module=facts.nvidia_fs(),
            kernel_rose=rose,
            kernel_p2pdma=facts.p2pdma() if counted.p2pdma else None,
            place=place,
        )


def judge(
    counted: Counts,
    bodies: int,
    edges: int,
    *,
    shared: bool = False,
    module: str | None = None,
    kernel_rose: int | None = None,
    kernel_p2pdma: bool | None = None,
    place: str = "",
) -> Evidence:
    """Weigh counters against what the kernel says.

    Parameters
    ----------
    counted
        What cuFile counted during the transfer, for this GPU and direction.
    bodies, edges
        Requests that were made: aligned ones, and unaligned heads and tails, which may take another way.
    shared
        Whether other transfers of this process were counted, too.
    module
        Version of the nvidia-fs kernel module, None where it is not loaded.
    kernel_rose
        By how much the module's own counter rose meanwhile, for all processes; None where it does not count.
    kernel_p2pdma
        Whether the kernel has P2PDMA; None where it does not tell.
    place
        Why the drive is another machine's, for the words; "" for a local one.
    """
    words = _words(counted) + (" (with those of other transfers at the same time)" if shared else "")
    direct = counted.nvidia_fs + counted.p2pdma
    if min(counted.nvidia_fs, counted.p2pdma, counted.posix, counted.total) < 0:
        return Evidence(COMPAT, False, f"contradictory: cuFile's counters went backwards ({words})")
    if direct + counted.posix == 0:
        return Evidence(
            COMPAT, False, f"nothing shows that the bytes went past host memory: cuFile counted {words or 'no request'}"
        )
    if direct == 0:
        return Evidence(COMPAT, True, f"through host memory, as cuFile counted: {words}")
    if counted.nvidia_fs and module is None:
        return Evidence(COMPAT, False, f"contradictory: cuFile counted {words}, and nvidia-fs is not loaded")
    if counted.nvidia_fs and kernel_rose is not None and kernel_rose < 1:
        return Evidence(
            COMPAT, False, f"contradictory: cuFile counted {words}, and /proc/driver/nvidia-fs/stats counted nothing"
        )
    if counted.p2pdma and kernel_p2pdma is False:
        return Evidence(COMPAT, False, f"contradictory: cuFile counted {words}, and the kernel has no P2PDMA")
    # Heads and tails may pass host memory; of anything else that did, nobody can say which bytes it were.
    unaccounted = max(0, counted.total - direct - counted.posix)
    through_host = counted.posix + unaccounted
    if through_host > (0 if shared else edges) or (not shared and direct < bodies):
        return Evidence(COMPAT, False, f"mixed: cuFile counted {words}")
    path = NVIDIA_FS if counted.nvidia_fs >= counted.p2pdma else P2PDMA
    said = f"as cuFile counted: {words}"
    if counted.nvidia_fs:
        said += f"; nvidia-fs {module}" + ("" if kernel_rose is None else f" counted {kernel_rose}, too")
    if counted.p2pdma and kernel_p2pdma is None:
        said += "; the kernel does not tell whether it has P2PDMA"
    if place:
        said += f"; {place}"
    return Evidence(path, True, said)


def _words(counted: Counts) -> str:
    ways = (
        (counted.nvidia_fs, "by nvidia-fs"),
        (counted.p2pdma, "by P2PDMA"),
        (counted.posix, "through host memory"),
        (max(0, counted.total - counted.nvidia_fs - counted.p2pdma - counted.posix), "of no kind"),
    )
    said = [f"{number} {way}" for number, way in ways if number]
    if counted.unaligned:
        said.append(f"{counted.unaligned} of them unaligned")
    if counted.routed:
        said.append(f"{counted.routed} routed through another GPU")
    return ", ".join(said)


_lock = threading.Lock()
_active: set[Witness] = set()


def _enter(witness: Witness) -> bool:
    """Whether others look at the same counters; those are told."""
    with _lock:
        others = [other for other in _active if other._context is witness._context and other._write == witness._write]
        for other in others:
            other.shared = True
        _active.add(witness)
        return bool(others)


def _leave(witness: Witness) -> None:
    with _lock:
        _active.discard(witness)
