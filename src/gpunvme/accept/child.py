"""Where steps run: a process that has everything imported, and forks for each.

``python -m gpunvme.accept.child PARENT`` reads orders from standard input, three lines each: the function, the `Job`,
and the file for the answer. It says ``began PID`` and ``ended STATUS`` on standard output; what a step prints goes to
standard error. It has no threads and touches neither CUDA nor a drive: what no forked process must inherit.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import json
import os
import signal
import sys
from collections.abc import Callable

from gpunvme.accept.job import Job
from gpunvme.accept.result import Result, Skipped
from gpunvme.errors import UnsafeDeviceError

_PR_SET_PDEATHSIG = 1
_IMPORTED = ("gpunvme.nvme", "gpunvme.doctor", "gpunvme.catalog.target", "gpunvme.paths.choose")

Function = Callable[[Job], Result]


def end_with(parent: int) -> None:
    """End with the process that started this one, whatever it dies of (prctl(2), PR_SET_PDEATHSIG)."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before
        os._exit(1)


def find(name: str) -> Function:
    """Return the function that ``module:function`` names."""
    module, _, function = name.partition(":")
    found: Function = getattr(importlib.import_module(module), function)
    return found


def answer_of(name: str, job: Job) -> dict[str, object]:
    """Do a step and return what came of it, for JSON. Whatever it raises is an answer, too."""
    try:
        result = find(name)(job)
    except Skipped as why:
        return {"outcome": "skipped", "reason": str(why)}
    except UnsafeDeviceError as error:
        # Nothing was written: it is always said before.
        return {"outcome": "failed", "reason": _words(error), "facts": {"untouched": True}}
    except Exception as error:  # noqa: BLE001 - a step that fails is a row, and not the end
        return {"outcome": "failed", "reason": _words(error)}
    figures = [vars(figure) for figure in result.figures]
    return {"outcome": "passed", "reason": result.seen, "figures": figures, "facts": result.facts}


def _words(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def main(parent: int) -> None:
    """Carry out orders until there are no more."""
    end_with(parent)
    for module in _IMPORTED:
        importlib.import_module(module)
    while True:
        order = [sys.stdin.readline().strip() for _ in range(3)]
        if not all(order):
            return
        process = os.fork()
        if process == 0:
            _step(*order)
            return  # an ordinary end: what closes controllers at the end of a process does
        _lead(process)
        print(f"began {process}", flush=True)
        _, status = os.waitpid(process, 0)
        print(f"ended {os.waitstatus_to_exitcode(status)}", flush=True)


def _lead(process: int) -> None:
    """Give a process a group of its own: it can be ended with all that it starts.

    Done on both sides of the fork: whoever is told of the process can rely on it.
    """
    with contextlib.suppress(OSError):  # it has ended
        os.setpgid(process, process)


def _step(name: str, order: str, answer: str) -> None:
    """Be the child that does a step."""
    _lead(0)
    end_with(os.getppid())
    # Nobody that it starts may keep its parent's end of anything open.
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    os.dup2(os.open(os.devnull, os.O_RDONLY), sys.stdin.fileno())
    text = json.dumps(answer_of(name, Job.decode(order)))
    with open(answer, "w") as file:
        file.write(text + "\n")


if __name__ == "__main__":
    main(int(sys.argv[1]))
