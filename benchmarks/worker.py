"""A contestant in a process of its own: one that crashes or hangs loses its own figures and nobody else's.

The parent sends one JSON line a request, the child answers with one. What the contestant's libraries print goes to a
log, not between the answers. The child keeps its CUDA context, memory and open files from one request to the next, as
a program that uses the library would.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import json
import os
import select
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import IO, Any

HERE = Path(__file__).resolve().parent
SOURCES = HERE.parent / "src"


class WorkerError(Exception):
    """The contestant failed, crashed or did not answer in time; the message says which."""


class Worker:
    """A contestant's process, seen from the parent.

    Parameters
    ----------
    adapter : str
        ``"module:Class"``, for example ``"peers:Kvikio"``.
    settings : dict
        What the class is made with.
    environment : dict, optional
        Variables set in addition.
    """

    def __init__(self, adapter: str, settings: dict[str, Any], environment: dict[str, str] | None = None) -> None:
        self.adapter = adapter
        self._log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - closed by close()
        self._process = subprocess.Popen(
            [sys.executable, str(HERE / "worker.py"), adapter, json.dumps(settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env=os.environ | (environment or {}),
        )
        self._rest = b""

    def call(self, verb: str, limit: float = 120.0, **arguments: Any) -> dict[str, Any]:
        """Ask the contestant to do something.

        Parameters
        ----------
        verb : str
            The method.
        limit : float
            Seconds after which its process is ended.
        **arguments
            The method's arguments, JSON-able.

        Returns
        -------
        dict
            What the method returned.

        Raises
        ------
        WorkerError
            If it raised, crashed or took too long.
        """
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps([verb, arguments]).encode() + b"\n")
            self._process.stdin.flush()
        except (BrokenPipeError, ValueError) as error:
            raise WorkerError(f"its process is gone{self._last_words()}") from error
        answer: dict[str, Any] = json.loads(self._line(verb, limit))
        if "error" in answer:
            raise WorkerError(answer["error"])
        return answer

    def _line(self, verb: str, limit: float) -> bytes:
        assert self._process.stdout is not None
        descriptor, deadline = self._process.stdout.fileno(), time.monotonic() + limit
        while b"\n" not in self._rest:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([descriptor], [], [], left)[0]:
                self._process.kill()
                raise WorkerError(f"{verb} did not finish within {limit:.0f} s{self._last_words()}")
            more = os.read(descriptor, 1 << 16)
            if not more:
                status = self._process.wait()
                raise WorkerError(f"its process ended with status {status} in {verb}{self._last_words()}")
            self._rest += more
        line, _, self._rest = self._rest.partition(b"\n")
        return line

    def _last_words(self) -> str:
        self._log.seek(0)
        said = self._log.read().decode(errors="replace").strip().splitlines()
        return f": {' | '.join(said[-3:])[-300:]}" if said else ""

    def close(self) -> None:
        """End the process."""
        with contextlib.suppress(OSError):
            if self._process.stdin is not None:
                self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()
        self._log.close()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def serve(adapter: str, settings: dict[str, Any]) -> None:
    """Answer requests until there are no more (in the child).

    An adapter that cannot be made (its library is not installed, there is no GPU) answers every request with that.
    """
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    made: Any = None
    failure = ""
    try:
        module, _, name = adapter.partition(":")
        made = getattr(importlib.import_module(module), name)(**settings)
    except Exception as error:  # noqa: BLE001 - whatever a library raises when it is imported is the answer
        traceback.print_exc()
        failure = f"{type(error).__name__}: {error}"
    for line in sys.stdin:
        verb, arguments = json.loads(line)
        answer: dict[str, Any] = {"error": failure}
        if not failure:
            try:
                answer = getattr(made, verb)(**arguments) or {}
            except Exception as error:  # noqa: BLE001 - the contestant's failure is its result
                traceback.print_exc()
                answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    sys.path[:0] = [str(HERE)]
    if importlib.util.find_spec("gpunvme") is None:  # not installed: the source tree's, if it was built there
        sys.path[1:1] = [str(SOURCES)]
    serve(sys.argv[1], json.loads(sys.argv[2]))
    sys.stderr.flush()
    os._exit(0)  # a library that hangs while it is torn down must not hold everybody up
