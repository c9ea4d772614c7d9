"""What is measured: each case is one kind of reading, one state of the page cache, and everybody who takes part."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import gpunvme
from gpunvme.bench import contestants as who
from gpunvme.bench import fio, page_cache
from gpunvme.bench.contest import Check, Contestant
from gpunvme.bench.destinations import Destination, HostDestination
from gpunvme.bench.machine import IN_MEMORY, filesystem, size_text
from gpunvme.bench.page_cache import State
from gpunvme.bench.scratch import remove_quietly

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
RANDOM_BLOCKS = (4 * KIB, 64 * KIB, MIB)
DIRECT_DEPTHS = (8, 64)
RANDOM_DEPTHS = (64, 256)
_REPEATED = 256 * MIB  # small requests are repeated along the file until one run moves about this much
_IN_WORDS = {"hot": "hot", "cold": "cold", "half": "first half cached", "alternating": "every other MiB cached"}


@dataclass(frozen=True, slots=True)
class Scale:
    """How much is measured.

    Attributes
    ----------
    rounds : int
        Timed runs of each contestant.
    seconds : float
        No further round of a case starts after this long.
    largest : int
        Bytes of the largest sequential read.
    cold : int
        Bytes of a cold or half-cached sequential read.
    hot_random, cold_random : int
        Bytes of a gather.
    fio_seconds : float
        How long fio reads at random.
    """

    rounds: int
    seconds: float
    largest: int
    cold: int
    hot_random: int
    cold_random: int
    fio_seconds: float


FULL = Scale(5, 15.0, 4 * GIB, GIB, 512 * MIB, 64 * MIB, 1.0)
QUICK = Scale(3, 3.0, 256 * MIB, 128 * MIB, 64 * MIB, 24 * MIB, 0.3)


@dataclass(slots=True)
class Case:
    """One comparison.

    Attributes
    ----------
    name : str
        What is compared, in words.
    block : int
        Bytes per request.
    before : callable
        Brings file and page cache into the case's state.
    contestants : list of Contestant
        Who takes part.
    check : Check or None
        Verifies what arrived.
    warm_up : bool
        Whether one run does not count.
    why_not : str
        Why the case cannot be measured here, if so.
    """

    name: str
    block: int
    before: Callable[[], float | None] = field(default=lambda: None)
    contestants: list[Contestant] = field(default_factory=list)
    check: Check | None = None
    warm_up: bool = True
    why_not: str = ""


@dataclass(frozen=True, slots=True)
class Subject:
    """What the cases are about: the file, where its bytes go, and who else can take part."""

    path: str
    nbytes: int
    to: Destination
    host: Destination
    with_fio: bool

    @property
    def on_gpu(self) -> bool:
        """Whether the destination is a GPU."""
        return self.to.device != "cpu"

    @property
    def cannot_be_cold(self) -> str:
        """Why nothing of the file can be read cold, or an empty string."""
        kind = filesystem(self.path)[0]
        return f"{kind} lives in memory: nothing on it is ever cold" if kind in IN_MEMORY else ""


def sequential(subject: Subject, size: int, scale: Scale) -> Case:
    """Read ``size`` bytes at a time, all of it in the page cache."""
    requests = max(1, min(_REPEATED, subject.nbytes, subject.to.nbytes, scale.largest) // size)
    work = who.Sequential(subject.path, subject.to, size, requests)
    case = Case(f"sequential, {size_text(size)} at a time, hot", size)
    case.before = _state(subject, "hot", work.nbytes)
    case.check = who.SampleCheck(work)
    case.contestants = [who.ours_sequential(work), who.mmap_sequential(work), who.pread_sequential(work, 1)]
    if size >= 16 * MIB and who.threads() > 1:
        case.contestants.append(who.pread_sequential(work, who.threads()))
    if subject.on_gpu:
        case.contestants.append(who.copy_ceiling(subject.to.device, max(size, 256 * MIB)))
    elif subject.with_fio and size >= MIB:
        job = fio.Job(subject.path, work.nbytes, MIB, random=False, engine="psync", jobs=who.threads())
        case.contestants.append(fio.contestant(job, "limit"))
    return case


def not_cached(subject: Subject, state: State, scale: Scale) -> Case:
    """Read the file's start in one request while none or half of it is in the page cache."""
    nbytes = min(scale.cold, subject.nbytes, subject.to.nbytes)
    case = Case(f"sequential, {size_text(nbytes)}, {_IN_WORDS[state]}", nbytes, why_not=subject.cannot_be_cold)
    if state != "cold" and nbytes < 8 * MIB:
        case.why_not = "the file is too small to be cached in part"
    if case.why_not:
        return case
    work = who.Sequential(subject.path, subject.to, nbytes, 1)
    case.before = _state(subject, state, nbytes)
    case.check = who.SampleCheck(work)
    case.warm_up = False
    case.contestants = [who.ours_sequential(work), who.mmap_sequential(work), who.pread_sequential(work, 1)]
    if who.threads() > 1:
        case.contestants.append(who.pread_sequential(work, who.threads()))
    if nbytes >= MIB:
        for depth in DIRECT_DEPTHS:
            case.contestants.append(who.direct_sequential(subject.path, subject.host, nbytes, depth))
        if subject.with_fio and state == "cold":
            job = fio.Job(subject.path, nbytes, MIB, random=False, engine="io_uring", depth=DIRECT_DEPTHS[-1])
            case.contestants.append(fio.contestant(job, "limit"))
    return case


def gather(subject: Subject, block: int, state: State, scale: Scale, keep: contextlib.ExitStack) -> Case:
    """Read blocks at random places of the file."""
    hot = state == "hot"
    case = Case(f"random, {size_text(block)}, {state}", block)
    if not hot:
        case.why_not = subject.cannot_be_cold
    if subject.nbytes < 2 * block:
        case.why_not = "the file is too small"
    if case.why_not:
        return case
    count = max(1, min(scale.hot_random if hot else scale.cold_random, subject.to.nbytes) // block)
    if not hot:
        count = max(count, min(64, subject.to.nbytes // block))
    offsets = who.random_offsets(subject.nbytes, block, count)
    work = who.Random(subject.path, subject.to, block, offsets)
    case.before = _state(subject, state, subject.nbytes)
    case.check = who.SampleCheck(work)
    case.warm_up = hot
    case.contestants = [who.ours_random(work)]
    if hot:
        case.contestants.append(who.ours_random_again(work, keep.enter_context(gpunvme.open(subject.path))))
        case.contestants += [who.pread_random(work, 1), who.mmap_random(work, 1)]
    if not hot or who.threads() > 1:
        case.contestants += [who.pread_random(work, who.threads()), who.mmap_random(work, who.threads())]
    if hot and subject.on_gpu:
        case.contestants.append(who.copy_ceiling(subject.to.device, 256 * MIB))
    for depth in () if hot else RANDOM_DEPTHS:
        case.contestants.append(who.direct_random(subject.path, subject.host, offsets, block, depth))
    if subject.with_fio:
        case.contestants += _fio_random(subject, block, hot, scale)
    return case


def _fio_random(subject: Subject, block: int, hot: bool, scale: Scale) -> list[Contestant]:
    job = fio.Job(subject.path, subject.nbytes, block, random=True, engine="psync", seconds=scale.fio_seconds)
    if not hot:
        return [fio.contestant(replace(job, engine="io_uring", depth=RANDOM_DEPTHS[-1]), "limit")]
    if subject.on_gpu:
        return []
    threaded = replace(job, jobs=who.threads())
    return [fio.contestant(threaded, "limit"), fio.contestant(replace(threaded, engine="mmap"), "limit")]


def write(subject: Subject, path: str, scale: Scale) -> Case:
    """Write a new file and bring it to the drive.

    Parameters
    ----------
    subject : Subject
        What is in its destination is what is written.
    path : str
        A temporary file; removed before every run. Empty where there can be none.
    scale : Scale
        How much.
    """
    nbytes = min(scale.cold, subject.to.nbytes) // MIB * MIB
    case = Case(f"write, {size_text(nbytes)}, a new file, to the drive", max(nbytes, MIB), warm_up=False)
    if nbytes == 0:
        case.why_not = "less than 1 MiB to write"
    if not path:
        case.why_not = "there is no directory for a temporary file beside something that is not a regular file"
    if case.why_not:
        return case

    def remove() -> float | None:
        remove_quietly(path)
        return None

    case.before = remove
    case.contestants = [who.ours_write(path, subject.to, nbytes), who.pwrite_sequential(path, subject.to, nbytes)]
    case.contestants += [who.direct_write(path, subject.host, nbytes, depth) for depth in DIRECT_DEPTHS]
    return case


def _state(subject: Subject, state: State, nbytes: int) -> Callable[[], float | None]:
    return lambda: page_cache.bring(subject.path, state, nbytes)


def reading(subject: Subject, sizes: list[int], scale: Scale, keep: contextlib.ExitStack) -> Iterator[Case]:
    """Yield every case that reads, hot ones first.

    Parameters
    ----------
    subject : Subject
        The file and its destination.
    sizes : list of int
        Sizes of sequential requests.
    scale : Scale
        How much.
    keep : contextlib.ExitStack
        Closes what a case keeps open; empty it after each case, or the file stays mapped and cannot become cold.
    """
    for size in sizes:
        yield sequential(subject, size, scale)
    for block in RANDOM_BLOCKS:
        yield gather(subject, block, "hot", scale, keep)
    states: tuple[State, ...] = ("cold", "half", "alternating")
    for state in states:
        yield not_cached(subject, state, scale)
    for block in RANDOM_BLOCKS:
        yield gather(subject, block, "cold", scale, keep)


def host_buffer(to: Destination, nbytes: int) -> Destination:
    """Return host memory for the raw O_DIRECT readers: the destination itself if it is on the host."""
    return to if to.device == "cpu" else HostDestination(nbytes)
