"""The cuFile driver opened in a child process first: on some machines cuFileDriverOpen never returns.

``python -m gpunvme.cufile.probe`` is that child.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import threading
from dataclasses import dataclass

from gpunvme import _native
from gpunvme.errors import Error

DEADLINE = 30.0  # seconds; creating contexts on eight GPUs takes several
_lock = threading.Lock()


@dataclass(frozen=True, slots=True)
class Probed:
    """What became of it: ``problem`` is "" where the driver opened and closed."""

    problem: str
    version: int = 0


def probe() -> Probed:
    """Try it; once in a process."""
    with _lock:  # one child, however many threads ask
        return _probe()


@functools.cache
def _probe() -> Probed:
    if not sys.executable:
        return Probed("there is no Python to try cuFileDriverOpen in (sys.executable is empty)")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    try:
        child = subprocess.run(
            [sys.executable, "-W", "ignore", "-m", "gpunvme.cufile.probe"],
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_deadline(),
            check=False,
        )
    except subprocess.TimeoutExpired:
        return Probed(f"cuFileDriverOpen did not return within {_deadline():.0f} s in a child process")
    except OSError as error:
        return Probed(f"no child process to try cuFileDriverOpen in: {error}")
    return _told(child)


def _told(child: subprocess.CompletedProcess[bytes]) -> Probed:
    try:
        answer = json.loads(child.stdout.splitlines()[-1])
        return Probed(str(answer["problem"]), int(answer["version"]))
    except (ValueError, IndexError, KeyError, TypeError):
        last = child.stderr.decode("utf-8", "replace").strip().splitlines()[-1:]
        why = f" ({last[0]})" if last else ""
        return Probed(f"a child process that opened the cuFile driver ended with {child.returncode}{why}")


def _deadline() -> float:
    try:
        return float(os.environ.get("GPUNVME_CUFILE_DEADLINE", DEADLINE))
    except ValueError:
        return DEADLINE


def _try() -> dict[str, object]:
    if reason := _native.cuda_unavailable_reason():
        return {"problem": reason, "version": 0}
    from gpunvme.cufile import library

    try:
        number = library.version()
        library.call("driver_open")
        library.call("driver_close")
    except Error as error:
        return {"problem": str(error), "version": 0}
    return {"problem": "", "version": number}


if __name__ == "__main__":
    print(json.dumps(_try()), flush=True)
    os._exit(0)  # nothing that libcufile does at the end of a process is of interest
