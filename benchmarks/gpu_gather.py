"""Random 4 KiB blocks of a file, gathered into GPU memory: hot, cold, the first call.

Run it on a machine with an NVIDIA GPU; see README.md.
"""

from __future__ import annotations

import os
from typing import Any

from gpunvme.bench import page_cache
from gpunvme.bench.machine import size_text
from session import GIB, Session, options, size

BLOCK = 4096
DEPTHS = (64, 256, 1024)
OURS = "gpunvme"
KVIKIO = "KvikIO, a future a block"
MEMMAP = "numpy.memmap[rows], .to('cuda')"
SELECT = "torch.index_select to pinned, .to('cuda')"
LIMITS = "limits"
SEED = 0


def main() -> None:
    parser = options(__doc__ or "", deadline=90)
    parser.add_argument("--size", type=size, default=4 * GIB, help="of the file (default: 4GiB)")
    parser.add_argument("--count", type=int, default=500_000, help="blocks of a hot gather (default: %(default)s)")
    parser.add_argument("--cold-count", type=int, default=100_000, help="of a cold one (default: %(default)s)")
    arguments = parser.parse_args()
    scale = 8 if arguments.quick else 1
    with Session("gpu_gather", arguments) as session:
        nbytes = arguments.size // scale
        hot, cold = arguments.count // scale, arguments.cold_count // scale
        path = session.file("file", nbytes)
        session.workers(
            {
                OURS: ("ours:Gpunvme", {}),
                KVIKIO: ("peers:Kvikio", {"threads": 16}),
                MEMMAP: ("peers:NumpyTorch", {"way": "memmap"}),
                SELECT: ("peers:NumpyTorch", {"way": "index_select"}),
                LIMITS: ("ours:Limits", {}),
            },
            nbytes=max(hot, cold) * BLOCK,
        )
        if "why_not" not in session.result["contestants"][LIMITS]:
            session.worker(LIMITS).call("prepare_gpu", nbytes=max(hot, cold) * BLOCK)
        measure_hot(session, path, nbytes, hot)
        measure_cold(session, path, nbytes, cold)


def measure_hot(session: Session, path: str, nbytes: int, count: int) -> None:
    case = f"random {size_text(BLOCK)} of a {size_text(nbytes)} file to GPU, hot"
    asked: dict[str, Any] = {"path": path, "file_bytes": nbytes, "block": BLOCK, "seed": SEED}
    checked = asked | {"check": "check_gather"}
    threads = min(16, len(os.sched_getaffinity(0)))
    session.hold(
        case,
        [
            session.contestant(OURS, "ours", "gather", keep=True, count=count, **checked),
            # A slow way is asked for fewer blocks, so that the run ends; rates are per block.
            session.contestant(KVIKIO, "peer", "gather", count=count // 10, **checked),
            session.contestant(MEMMAP, "peer", "gather", count=count // 4, **checked),
            session.contestant(SELECT, "peer", "gather", count=count, **checked),
            *(
                session.contestant(
                    f"{way} × {threads} into page-locked, then copy",
                    "peer",
                    "threads_gather",
                    worker=LIMITS,
                    way=way,
                    threads=threads,
                    count=count,
                    **checked,
                )
                for way in ("pread", "mmap")
            ),
            session.contestant(
                "page-locked memory to GPU", "limit", "copy_ceiling", worker=LIMITS, nbytes=min(count * BLOCK, GIB)
            ),
        ],
        lambda: page_cache.bring(path, "hot", nbytes),
        block=BLOCK,
    )
    session.target_iops(case, 5e6)
    for name in (OURS, MEMMAP, SELECT):
        if "why_not" not in session.result["contestants"][name]:
            session.worker(name).call("forget")


def measure_cold(session: Session, path: str, nbytes: int, count: int) -> None:
    case = f"random {size_text(BLOCK)} of a {size_text(nbytes)} file to GPU, cold"
    asked: dict[str, Any] = {"path": path, "file_bytes": nbytes, "block": BLOCK, "seed": SEED + 1}
    checked = asked | {"check": "check_gather"}
    few = max(1, count // 20)
    slow = [
        session.contestant(KVIKIO, "peer", "gather", count=few, **checked),
        *(
            session.contestant(
                f"pread × {threads} into page-locked, then copy",
                "peer",
                "threads_gather",
                worker=LIMITS,
                way="pread",
                threads=threads,
                count=few * 2,
                **checked,
            )
            for threads in (16, 64)
        ),
    ]
    session.hold(
        case,
        [
            session.contestant(OURS, "ours", "gather", keep=False, count=count, **checked),
            *slow,
            *(
                session.contestant(
                    f"raw O_DIRECT into host memory, depth {depth}",
                    "limit",
                    "direct_gather",
                    worker=LIMITS,
                    depth=depth,
                    count=count,
                    **asked,
                )
                for depth in DEPTHS
            ),
        ],
        lambda: page_cache.bring(path, "cold", nbytes),
        block=BLOCK,
        warm_up=False,
    )
    session.target(case, "any", 0.97)


if __name__ == "__main__":
    main()
