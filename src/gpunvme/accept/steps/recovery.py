"""What a driver must survive: commands aborted, the controller reset under load, its process killed."""

from __future__ import annotations

import os
import signal
import threading
import time
from typing import NoReturn

import numpy as np

from gpunvme import nvme
from gpunvme.accept.job import MIB, Job, compare, contents
from gpunvme.accept.result import Result
from gpunvme.accept.steps.driver import area_of, fill
from gpunvme.errors import CommandError, FileError, TransportError
from gpunvme.nvme.status import Status, code
from gpunvme.nvme.transport import connect

_SEED = 30
_RESETS, _WORKERS = 3, 2
_ABORTED, _IN_FLIGHT = 3, 32
_VALUE = 0x5A
_SECONDS = 30.0
_LOOK_SECONDS = 0.05


def abort(job: Job) -> Result:
    """Abort commands while they are under way: what is not reported as aborted arrives whole."""
    asked = aborted = reported = 0
    with nvme.open(job.uri) as controller:
        data = fill(controller, job, _SEED)
    for _ in range(_ABORTED):
        with nvme.open(job.uri, queues=1, depth=_IN_FLIGHT + 1) as controller:
            namespace = controller.namespace(job.nsid)
            found = np.zeros(job.area_nbytes, np.uint8)
            reading = namespace.read_into(found, area_of(job), wait=False, timeout=_SECONDS)
            # The first commands of a new queue: their identifiers count from 0.
            for cid in range(_IN_FLIGHT):
                asked += 1
                aborted += controller.abort(1, cid)
            try:
                reading.wait(_SECONDS)
            except CommandError as error:
                if {code(failed.status) for failed in error.failures} != {Status.ABORT_REQUESTED}:
                    raise
                reported += len(error.failures)
            else:
                compare(found, data, "what was read while commands were aborted")
            found = namespace.read(area_of(job), job.area_nbytes // job.block_size).numpy()
            compare(found, data, "what was read afterwards")
    said = f"{asked} aborts asked for, {aborted} done"
    return Result(said + (f", {reported} commands reported" if reported else ""), facts={"left": _SEED})


def reset(job: Job) -> Result:
    """Reset the controller under load, then the function: nothing is lost, nothing is wrong."""
    half = job.area_nbytes // _WORKERS // MIB * MIB
    nbytes = min(half, MIB)
    with nvme.open(job.uri, queues=2, depth=32) as controller:
        namespace = controller.namespace(job.nsid)
        stop = threading.Event()
        failures: list[Exception] = []
        rounds = [0] * _WORKERS
        again = [threading.Event() for _ in range(_WORKERS)]

        def work(which: int) -> None:
            lba = area_of(job) + which * half // job.block_size
            try:
                while not stop.is_set():
                    data = contents(1000 * which + rounds[which], nbytes)
                    namespace.write_from(data, lba, timeout=_SECONDS)
                    found = np.zeros(nbytes, np.uint8)
                    namespace.read_into(found, lba, timeout=_SECONDS)
                    compare(found, data, f"what was read between resets, round {rounds[which]}")
                    rounds[which] += 1
                    again[which].set()
            except Exception as error:  # noqa: BLE001 - raised below
                failures.append(error)

        threads = [threading.Thread(target=work, args=(which,)) for which in range(_WORKERS)]
        for thread in threads:
            thread.start()
        try:
            for _ in range(_RESETS):
                # Between two resets each has to come through once.
                for event in again:
                    event.clear()
                while not failures and not all(event.wait(_LOOK_SECONDS) for event in again):
                    pass  # each has a deadline of its own
                if failures:
                    break
                controller.reset()
        finally:
            stop.set()
            for thread in threads:
                thread.join()
        if failures:
            raise failures[0]
        fill(controller, job, _SEED + 1)
    said = f"{_RESETS} times under load, {sum(rounds)} MiB written and read meanwhile; "
    return Result(said + _reset_function(job), facts={"left": _SEED + 1})


def _reset_function(job: Job) -> str:
    transport = connect(job.uri)
    try:
        if getattr(transport, "can_reset", True):
            transport.reset()
            said = "the function was reset, too"
        else:
            said = "the function has no reset"
    finally:
        transport.close()
    with nvme.open(job.uri) as controller:
        found = controller.namespace(job.nsid).read(area_of(job), job.area_nbytes // job.block_size).numpy()
        compare(found, contents(_SEED + 1, job.area_nbytes), "what was read after the function was reset")
    return said


def killed(job: Job) -> Result:
    """Kill a process that writes: the next one finds a controller that works, and what was acknowledged."""
    said, says = os.pipe()
    writer = os.fork()
    if writer == 0:
        _write_for_ever(job, says)
    os.close(says)
    try:
        if os.read(said, 1) != b".":
            raise ValueError("the process that was to be killed could not write")
    finally:
        os.close(said)
        os.kill(writer, signal.SIGKILL)
        os.waitpid(writer, 0)
    with _open_after(job.uri) as controller:
        found = controller.namespace(job.nsid).read(area_of(job), job.area_nbytes // job.block_size).numpy()
        compare(found.reshape(-1), np.full(job.area_nbytes, _VALUE, np.uint8), "what a killed process had written")
        fill(controller, job, _SEED + 2)
    seen = "while it wrote: what was acknowledged was there, and the controller came back"
    return Result(seen, facts={"left": _SEED + 2})


def _open_after(uri: str) -> nvme.Controller:
    """Open a controller that a killed process had: the kernel lets go of some of that shortly after its end."""
    give_up = time.monotonic() + _SECONDS
    while True:
        try:
            return nvme.open(uri)
        except (TransportError, FileError):
            if time.monotonic() > give_up:
                raise
            time.sleep(_LOOK_SECONDS)


def _write_for_ever(job: Job, says: int) -> NoReturn:
    """Write the test area, say so, write the same again and again. For a forked process, which ends here."""
    try:
        controller = nvme.open(job.uri)
        namespace, data = controller.namespace(job.nsid), np.full(job.area_nbytes, _VALUE, np.uint8)
        while True:
            namespace.write_from(data, area_of(job))
            namespace.flush()
            os.write(says, b".")
    finally:
        os._exit(1)
