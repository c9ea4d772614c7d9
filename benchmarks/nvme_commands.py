"""NVMe commands per second: random 4 KiB reads by the user-space driver, one queue, at several depths.

Over a software controller in this process and over vfio-user in a process of its own, with fio on a file of the same
size beside it. Needs two cores and no hardware; see README.md.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

import gpunvme
from gpunvme import nvme
from gpunvme.bench import fio, page_cache
from gpunvme.bench.contest import Contestant, Run
from session import MIB, Session, options, size

BLOCK = 4096
DEPTHS = (1, 32, 128)
# What a driver in C reached against a target in C on such a machine, commands per second: the aim is to pass it.
AIMS = {1: 0.7e6, 32: 1.15e6}


def main() -> None:
    parser = options(__doc__ or "", deadline=150, rounds=7)
    parser.add_argument("--size", type=size, default=256 * MIB, help="of the namespace (default: 256MiB)")
    parser.add_argument("--count", type=int, default=400_000, help="commands of a run (default: %(default)s)")
    arguments = parser.parse_args()
    count = arguments.count // (8 if arguments.quick else 1)
    with Session("nvme_commands", arguments) as session, contextlib.ExitStack() as cleanup:
        path = session.file("file", arguments.size)
        session.result["contestants"]["fio"] = {"version": fio.version() or "", "settings": "--invalidate=0"}
        session.result["contestants"]["gpunvme"] = {"version": gpunvme.__version__, "settings": "1 queue"}
        socket = cleanup.enter_context(served(arguments.size))
        ways = {
            "vfio-user": f"vfio-user:{socket}",
            "a controller in this process": f"soft:ram?size={arguments.size}&lba={BLOCK}",
        }
        for way, uri in ways.items():
            for depth in DEPTHS:
                case = f"random 4 KiB reads over {way}, 1 queue, {depth} in flight"
                members = [reads("gpunvme", uri, depth, count)]
                members += fio_jobs(path, arguments.size, depth) if fio.version() else []
                session.hold(case, members, lambda: page_cache.bring(path, "hot", arguments.size), block=BLOCK)
                if way == "vfio-user" and depth in AIMS:
                    session.target_iops(case, AIMS[depth])


@contextlib.contextmanager
def served(nbytes: int) -> Iterator[Path]:
    """Serve a software controller from a process of its own."""
    with tempfile.TemporaryDirectory() as directory:
        socket = Path(directory) / "controller"
        image = f"ram?size={nbytes}&lba={BLOCK}"
        command = [sys.executable, "-m", "gpunvme", "nvme", "soft", image, "--socket", str(socket)]
        server = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        try:
            give_up = time.monotonic() + 30
            while not socket.exists():
                if server.poll() is not None or time.monotonic() > give_up:
                    raise RuntimeError(f"{' '.join(command)} does not serve {socket}")
                time.sleep(0.01)
            yield socket
        finally:
            server.terminate()
            server.wait(10)


def reads(name: str, uri: str, depth: int, count: int) -> Contestant:
    """Read blocks at random. The controller is open only during a run: it would take a core from the others."""
    once = 8192  # into 32 MiB, again and again, as fio does with less

    def run() -> Run:
        # A queue of so many entries holds one command less.
        with nvme.open(uri, queues=1, depth=depth + 1) as controller:
            namespace = controller.namespace()
            out = controller.buffer(once * BLOCK)
            lbas = np.random.default_rng(1).integers(0, namespace.blocks, once)
            namespace.gather(lbas, out=out)
            rounds = max(1, count // once)
            start = time.perf_counter()
            for _ in range(rounds):
                namespace.gather(lbas, out=out)
            return Run(time.perf_counter() - start, rounds * once * BLOCK, "nvme")

    return Contestant(name, "ours", run, settings=uri, lands=False, warms_up=True)


def fio_jobs(path: str, nbytes: int, depth: int) -> list[Contestant]:
    """Return fio through the page cache, and past it at the same depth."""
    job = {"path": path, "nbytes": nbytes, "block": BLOCK, "random": True, "seconds": 1.0}
    return [
        fio.contestant(fio.Job(engine="psync", **job), "peer"),
        fio.contestant(fio.Job(engine="io_uring", depth=depth, **job), "peer"),
    ]


if __name__ == "__main__":
    main()
