"""Files to host memory, without a GPU: hot and cold, in order and at random, and checkpoints as NumPy arrays.

Run it on any Linux machine; with fio installed it is compared with that too. See README.md.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gpunvme
from gpu_checkpoints import large_tensors, write
from gpunvme.bench import contestants as who
from gpunvme.bench import fio, page_cache
from gpunvme.bench.contest import Contestant, Kind, Run
from gpunvme.bench.destinations import HostDestination
from gpunvme.bench.machine import size_text
from session import GIB, MIB, Session, options, size

BLOCK = 4096
THREADS = 2
SEQUENTIAL_DEPTHS = (8, 32)
RANDOM_DEPTHS = (32, 128, 256)


def main() -> None:
    parser = options(__doc__ or "", deadline=150, rounds=5)
    parser.add_argument("--size", type=size, default=GIB, help="of the hot file (default: 1GiB)")
    parser.add_argument("--cold", type=size, default=512 * MIB, help="of cold reads (default: 512MiB)")
    parser.add_argument("--count", type=int, default=250_000, help="blocks of a hot gather (default: %(default)s)")
    parser.add_argument("--cold-count", type=int, default=50_000, help="of a cold one (default: %(default)s)")
    arguments = parser.parse_args()
    scale = 8 if arguments.quick else 1
    with Session("host_files", arguments) as session, contextlib.ExitStack() as cleanup:
        nbytes, cold = arguments.size // scale, arguments.cold // scale
        counts = arguments.count // scale, arguments.cold_count // scale
        path = session.file("file", nbytes)
        session.result["contestants"]["fio"] = {"version": fio.version() or "", "settings": "--invalidate=0"}
        session.result["contestants"]["gpunvme"] = {"version": gpunvme.__version__, "settings": "none"}
        to = HostDestination(max(nbytes, max(counts) * BLOCK))
        cleanup.callback(to.close)
        hot_sequential(session, path, to, nbytes)
        hot_random(session, path, to, nbytes, counts[0])
        cold_sequential(session, path, to, min(cold, nbytes))
        cold_random(session, path, to, nbytes, counts[1])
        half_cached(session, path, to, min(cold, nbytes))
        checkpoints(session, nbytes)


def fio_job(path: str, nbytes: int, block: int, **changed: Any) -> fio.Job:
    """Return a fio job with what all of them share."""
    return fio.Job(**({"path": path, "nbytes": nbytes, "block": block, "random": False, "engine": "psync"} | changed))


def with_fio(kind: Kind, *jobs: fio.Job) -> list[Contestant]:
    """Return fio's contestants, none where it is not installed."""
    return [fio.contestant(job, kind) for job in jobs] if fio.version() else []


def hot_sequential(session: Session, path: str, to: HostDestination, nbytes: int) -> None:
    case = f"{size_text(nbytes)} file to host memory, hot"
    work = who.Sequential(path, to, nbytes, 1)
    two = who.pread_sequential(work, THREADS)
    session.hold(
        case,
        [
            who.ours_sequential(work),
            who.pread_sequential(work, 1),
            two,
            who.mmap_sequential(work),
            *with_fio("limit", fio_job(path, nbytes, MIB, jobs=THREADS)),
        ],
        lambda: page_cache.bring(path, "hot", nbytes),
        check=who.SampleCheck(work),
    )
    session.target(case, two.name, 0.97)


def hot_random(session: Session, path: str, to: HostDestination, nbytes: int, count: int) -> None:
    case = f"random {size_text(BLOCK)} of a {size_text(nbytes)} file to host memory, hot"
    work = who.Random(path, to, BLOCK, who.random_offsets(nbytes, BLOCK, count))
    two = who.pread_random(work, THREADS)
    timed = {"random": True, "jobs": THREADS, "seconds": 1.0}
    with gpunvme.open(path) as kept:
        session.hold(
            case,
            [
                who.ours_random(work),
                who.ours_random_again(work, kept),
                who.pread_random(work, 1),
                two,
                who.mmap_random(work, THREADS),
                *with_fio(
                    "limit",
                    fio_job(path, nbytes, BLOCK, **timed),
                    fio_job(path, nbytes, BLOCK, engine="mmap", **timed),
                ),
            ],
            lambda: page_cache.bring(path, "hot", nbytes),
            check=who.SampleCheck(work),
            block=BLOCK,
        )
    session.target(case, two.name, 0.97)


def cold_sequential(session: Session, path: str, to: HostDestination, nbytes: int) -> None:
    case = f"{size_text(nbytes)} to host memory, cold"
    work = who.Sequential(path, to, nbytes, 1)
    session.hold(
        case,
        [
            who.ours_sequential(work),
            who.pread_sequential(work, 1),
            who.pread_sequential(work, THREADS),
            who.mmap_sequential(work),
            *(who.direct_sequential(path, to, nbytes, depth) for depth in SEQUENTIAL_DEPTHS),
            *with_fio("limit", *(fio_job(path, nbytes, MIB, engine="io_uring", depth=d) for d in SEQUENTIAL_DEPTHS)),
        ],
        lambda: page_cache.bring(path, "cold", nbytes),
        check=who.SampleCheck(work),
        warm_up=False,
    )
    session.target(case, "any", 0.97)


def cold_random(session: Session, path: str, to: HostDestination, nbytes: int, count: int) -> None:
    case = f"random {size_text(BLOCK)} of a {size_text(nbytes)} file to host memory, cold"
    work = who.Random(path, to, BLOCK, who.random_offsets(nbytes, BLOCK, count, seed=1))
    few = who.Random(path, to, BLOCK, who.random_offsets(nbytes, BLOCK, max(1, count // 10), seed=1))
    jobs = [
        fio_job(path, nbytes, BLOCK, random=True, engine="io_uring", depth=depth, seconds=1.0)
        for depth in RANDOM_DEPTHS
    ]
    session.hold(
        case,
        [
            who.ours_random(work),
            who.pread_random(few, THREADS),
            *(who.direct_random(path, to, work.offsets, BLOCK, depth) for depth in RANDOM_DEPTHS),
            *with_fio("limit", *jobs),
        ],
        lambda: page_cache.bring(path, "cold", nbytes),
        check=who.SampleCheck(few),  # the first blocks of the larger gather are the smaller one's
        block=BLOCK,
        warm_up=False,
    )
    session.target(case, "any", 0.97)


def half_cached(session: Session, path: str, to: HostDestination, nbytes: int) -> None:
    work = who.Sequential(path, to, nbytes, 1)
    states: dict[page_cache.State, str] = {"half": "first half cached", "alternating": "every other MiB cached"}
    for state, words in states.items():
        case = f"{size_text(nbytes)} to host memory, {words}"
        session.hold(
            case,
            [
                who.ours_sequential(work),
                who.pread_sequential(work, THREADS),
                who.direct_sequential(path, to, nbytes, SEQUENTIAL_DEPTHS[-1]),
            ],
            functools.partial(page_cache.bring, path, state, nbytes),
            check=who.SampleCheck(work),
            warm_up=False,
        )
        session.target(case, "any", 1.0)


def checkpoints(session: Session, nbytes: int) -> None:
    """A checkpoint as NumPy arrays, by this library and by safetensors."""
    path = write(session, "numpy", 0, large_tensors(nbytes), dtype="F16")
    length = Path(path).stat().st_size

    def run(load: Callable[[], object]) -> Run:
        start = time.perf_counter()
        loaded = load()
        seconds = time.perf_counter() - start
        del loaded
        return Run(seconds, length)

    contestants = [
        Contestant(
            "gpunvme.load_file",
            "ours",
            lambda: run(lambda: gpunvme.load_file(path, device="cpu", framework="numpy")),
            lands=False,
        )
    ]
    try:
        from safetensors.numpy import load_file
    except ImportError:
        session.result["contestants"]["safetensors"] = {"why_not": "not installed"}
    else:
        contestants.append(
            Contestant("safetensors.numpy.load_file", "peer", lambda: run(lambda: load_file(path)), lands=False)
        )
    states: tuple[page_cache.State, ...] = ("hot", "cold")
    for state in states:
        case = f"checkpoint, {size_text(nbytes)} in 1 file, to NumPy arrays, {state}"
        session.hold(
            case, contestants, functools.partial(page_cache.bring, path, state, length), warm_up=state == "hot"
        )
        session.target(case, "any", 1.0)


if __name__ == "__main__":
    main()
