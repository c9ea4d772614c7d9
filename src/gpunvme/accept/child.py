"""What runs in a child: one step, and an answer by a pipe. ``python -m gpunvme.accept.child PARENT PIPE``.

The child prepares itself, then waits for its order on standard input: the function and the `Job`, a line each.
"""

from __future__ import annotations

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


def answer_of(function: Function, job: Job) -> dict[str, object]:
    """Do a step and return what came of it, for JSON. Whatever it raises is an answer, too."""
    try:
        result = function(job)
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


def main(parent: int, pipe: int) -> None:
    """Wait for an order, carry it out, answer."""
    end_with(parent)
    import gpunvme.nvme  # noqa: F401 - what takes longest is done while the step before is running

    name, order = sys.stdin.readline(), sys.stdin.readline()
    if not order:
        return  # there is nothing more to do
    answer = answer_of(find(name.strip()), Job.decode(order))
    with os.fdopen(pipe, "w") as out:
        out.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
