"""Files to GPU memory and back: hot, cold, half cached, the first call of a process, writing.

Run it on a machine with an NVIDIA GPU; see README.md.
"""

from __future__ import annotations

import functools
import os

from gpunvme.bench import page_cache
from gpunvme.bench.contest import Contestant, Run
from gpunvme.bench.machine import size_text
from session import GIB, MIB, Session, options, size
from worker import Worker

DEPTHS = (16, 64)
OURS = "gpunvme"
KVIKIO = "KvikIO, 16 threads × 16 MiB"
KVIKIO_DIRECT = "KvikIO, the same, O_DIRECT"
CUFILE = "gpunvme by cufile/compat"  # what our own path has to be faster than
FROMFILE = "numpy.fromfile, .to('cuda')"
MEMMAP = "numpy.memmap, .to('cuda')"
LIMITS = "limits"
ADAPTERS = {
    OURS: ("ours:Gpunvme", {}),
    KVIKIO: ("peers:Kvikio", {"threads": 16, "task": 16 * MIB}),
    KVIKIO_DIRECT: ("peers:Kvikio", {"threads": 16, "task": 16 * MIB, "direct": True}),
    CUFILE: ("ours:Gpunvme", {"path": "cufile/compat"}),
    FROMFILE: ("peers:NumpyTorch", {"way": "fromfile"}),
    MEMMAP: ("peers:NumpyTorch", {"way": "memmap"}),
    LIMITS: ("ours:Limits", {}),
}


def main() -> None:
    parser = options(__doc__ or "", deadline=130)
    parser.add_argument("--size", type=size, default=8 * GIB, help="of the hot file (default: 8GiB)")
    parser.add_argument("--cold", type=size, default=2 * GIB, help="of cold reads and of writes (default: 2GiB)")
    arguments = parser.parse_args()
    scale = 8 if arguments.quick else 1
    with Session("gpu_files", arguments) as session:
        hot, cold = arguments.size // scale, arguments.cold // scale
        path = session.file("file", hot)
        session.workers({name: made for name, made in ADAPTERS.items() if name != LIMITS}, nbytes=hot)
        session.workers({LIMITS: ADAPTERS[LIMITS]}, nbytes=cold)
        measure_hot(session, path, hot, min(cold, hot))
        measure_first(session, path, hot)
        measure_not_cached(session, path, min(cold, hot))
        measure_writes(session, min(cold, hot))


def measure_hot(session: Session, path: str, nbytes: int, part: int) -> None:
    case = f"{size_text(nbytes)} file to GPU, hot"
    read = {"verb": "read", "path": path, "nbytes": nbytes, "check": "check"}
    slow = read | {"nbytes": part}  # slow ways are asked for less, so that the run ends; rates are per byte
    session.hold(
        case,
        [
            session.contestant(OURS, "ours", **read),
            session.contestant(KVIKIO, "peer", **read),
            session.contestant(CUFILE, "peer", **read),
            session.contestant(FROMFILE, "peer", **slow),
            session.contestant(MEMMAP, "peer", **slow),
            session.contestant(
                "page-locked memory to GPU", "limit", "copy_ceiling", worker=LIMITS, nbytes=min(nbytes, 2 * GIB)
            ),
        ],
        lambda: page_cache.bring(path, "hot", nbytes),
    )
    session.target(case, "limit", 0.95)
    session.target(case, KVIKIO, 1.08)


def measure_first(session: Session, path: str, nbytes: int) -> None:
    """The first call of a process: a fresh one each time, its CUDA context and its destination already made."""
    hot = f"{size_text(nbytes)} file to GPU, hot"
    case = f"{size_text(nbytes)} file to GPU, hot, first call of a process"

    def fresh(name: str) -> Run:
        with Worker(*ADAPTERS[name]) as worker:
            worker.call("about", 180)
            worker.call("prepare", 180, nbytes=nbytes)
            answer = worker.call("read", 60, path=path, nbytes=nbytes)
        return Run(answer["seconds"], answer["nbytes"], answer.get("path", ""), answer.get("reason", ""))

    session.hold(
        case,
        [
            Contestant(OURS, "ours", lambda: fresh(OURS), lands=False),
            Contestant(KVIKIO, "peer", lambda: fresh(KVIKIO), lands=False),
        ],
        lambda: page_cache.bring(path, "hot", nbytes),
        warm_up=False,
        seconds=25,
    )
    session.target(case, "limit", 0.8, of_case=hot)


def measure_not_cached(session: Session, path: str, nbytes: int) -> None:
    states: dict[page_cache.State, str] = {
        "cold": "cold",
        "half": "first half cached",
        "alternating": "every other MiB cached",
    }
    read = {"verb": "read", "path": path, "nbytes": nbytes, "check": "check"}
    threads = min(16, len(os.sched_getaffinity(0)))
    for state, words in states.items():
        case = f"{size_text(nbytes)} to GPU, {words}"
        members = [session.contestant(OURS, "ours", **read), session.contestant(KVIKIO, "peer", **read)]
        if state == "cold":
            members += [
                session.contestant(KVIKIO_DIRECT, "peer", **read),
                session.contestant(CUFILE, "peer", **read),
                session.contestant(MEMMAP, "peer", **read),
            ]
        else:
            members.append(
                session.contestant(
                    f"only buffered: pread × {threads} into host memory",
                    "limit",
                    "buffered_read",
                    worker=LIMITS,
                    path=path,
                    nbytes=nbytes,
                    threads=threads,
                )
            )
        members += [
            session.contestant(
                f"raw O_DIRECT into host memory, depth {depth}",
                "limit",
                "direct_read",
                worker=LIMITS,
                path=path,
                nbytes=nbytes,
                chunk=MIB,
                depth=depth,
            )
            for depth in (DEPTHS if state == "cold" else DEPTHS[-1:])
        ]
        session.hold(case, members, functools.partial(page_cache.bring, path, state, nbytes), warm_up=False)
        session.target(case, "any", 0.97 if state == "cold" else 1.0)


def measure_writes(session: Session, nbytes: int) -> None:
    case = f"GPU to a new {size_text(nbytes)} file, on the drive"
    path = session.removed_at_the_end(session.directory(nbytes) / "written")
    write = {"path": str(path), "nbytes": nbytes}

    def remove() -> float | None:
        path.unlink(missing_ok=True)
        return None

    session.hold(
        case,
        [
            session.contestant(OURS, "ours", "write", **write),
            session.contestant(KVIKIO, "peer", "write", **write),
            session.contestant(KVIKIO_DIRECT, "peer", "write", **write),
            session.contestant(CUFILE, "peer", "write", **write),
            session.contestant("tensor.cpu().numpy().tofile()", "peer", "write", worker=FROMFILE, **write),
            *(
                session.contestant(
                    f"raw O_DIRECT from host memory, depth {depth}",
                    "limit",
                    "direct_write",
                    worker=LIMITS,
                    depth=depth,
                    **write,
                )
                for depth in DEPTHS
            ),
        ],
        remove,
        warm_up=False,
    )
    session.target(case, "limit", 0.95)


if __name__ == "__main__":
    main()
