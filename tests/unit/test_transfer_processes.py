"""Transfers and the end, the interruption and the forking of the process they run in."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import pytest

import files
from files import MIB

if TYPE_CHECKING:
    from pathlib import Path

SIZE = 96 * MIB


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("processes") / "file"
    files.make(path, SIZE)
    return path


ENDING = """
import sys, threading
import numpy as np
import gpunvme
file = gpunvme.open(sys.argv[1])
how = sys.argv[2]
transfer = file.read_into(np.empty(file.size, np.uint8), wait=False)
if how == "dropped":
    del transfer, file
elif how == "read_many":
    other = gpunvme.read_many([(file, 0, np.empty(file.size, np.uint8))], wait=False)
elif how == "thread":
    threading.Thread(target=lambda: file.read_into(bytearray(file.size)), daemon=True).start()
elif how == "exit handler":
    import atexit
    atexit.register(transfer.cancel)
elif how == "transfer in exit handler":
    import atexit
    atexit.register(lambda: print("read", file.read(5, 70000).nbytes))
elif how == "waiting thread":
    threading.Thread(target=transfer.wait, daemon=True).start()
elif how == "global memory":
    memory = np.empty(file.size, np.uint8)
    more = file.read_into(memory, wait=False)
elif how == "error":
    raise SystemExit(3)
"""


TOO_LATE = """
import atexit, sys, threading, time
# Last of all, and no Python code behind it: the lock is kept, and then the interpreter has ended.
atexit.register(sum, range(20_000_000))
import numpy as np
from gpunvme import _native
file = open(sys.argv[1], "rb")
target = np.empty(20_000 * 4096, np.uint8)
read = lambda: _native.preadv_threads(file.fileno(), target.ctypes.data, np.zeros(20_000, np.int64), 4096, 1)
threading.Thread(target=read, daemon=True).start()
time.sleep(0.005)  # it begins, and is done while the lock is kept
sys.exit(4)
"""


def test_a_thread_that_comes_back_when_the_interpreter_has_ended(place: Path) -> None:
    """A program with daemon threads would be aborted at its end, now and then."""
    for _ in range(3):
        child = files.python(TOO_LATE, place)
        assert child.returncode == 4, child.stderr


@pytest.mark.parametrize(
    ("how", "code", "printed"),
    [
        ("held", 0, ""),
        ("dropped", 0, ""),
        ("read_many", 0, ""),
        ("thread", 0, ""),
        ("exit handler", 0, ""),
        ("transfer in exit handler", 0, "read 70000\n"),
        ("waiting thread", 0, ""),
        ("global memory", 0, ""),
        ("error", 3, ""),
    ],
)
def test_the_interpreter_ends_while_bytes_move(place: Path, how: str, code: int, printed: str) -> None:
    """Its memory is freed then; threads that go on reading into it make the process crash."""
    files.cool(place)
    child = files.python(ENDING, place, how)
    assert (child.returncode, child.stdout) == (code, printed), child.stderr
    assert "Fatal" not in child.stderr


INTERRUPTED = """
import sys
import numpy as np
import files, gpunvme
file = gpunvme.open(sys.argv[1])
memory = np.zeros(file.size, np.uint8)
print("ready", flush=True)
try:
    while True:
        files.cool(files.Path(sys.argv[1]))
        file.read_into(memory)
except KeyboardInterrupt:
    seen = memory.copy()
    import time
    time.sleep(0.02)
    assert (seen == memory).all(), "still written into"
    print("interrupted", flush=True)
    raise
"""


@pytest.mark.parametrize("round_", range(4))
def test_ctrl_c_during_a_large_read(place: Path, round_: int) -> None:
    files.cool(place)
    with subprocess.Popen(
        [sys.executable, "-X", "faulthandler", "-c", INTERRUPTED, str(place)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=files.environment(),
        text=True,
    ) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        time.sleep(random.Random(round_).uniform(0, 0.15))
        child.send_signal(signal.SIGINT)
        printed, complained = child.communicate(timeout=60)
    assert child.returncode == -signal.SIGINT, complained  # how Python ends by an uncaught KeyboardInterrupt
    assert printed == "interrupted\n"
    assert complained.rstrip().endswith("KeyboardInterrupt")


FORKING = """
import os, sys, traceback
import numpy as np
import files, gpunvme
path = files.Path(sys.argv[1])
data = path.read_bytes()
file = gpunvme.open(path)

def in_child(function):
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        try:
            function()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    assert os.waitpid(child, 0)[1] == 0, function.__name__

def reads():
    for offset, nbytes in ((5, 100), (1, 3 << 20), (0, len(data))):
        assert file.read(offset, nbytes).numpy().tobytes() == data[offset : offset + nbytes]
    assert file.gather([9, 5 << 20], 1000).numpy().tobytes() == data[9:1009] + data[5 << 20 :][:1000]
    with gpunvme.open(path) as own:
        assert own.read(7, 70000).numpy().tobytes() == data[7:70007]

def reads_in_grandchild():
    reads()
    in_child(reads)

in_child(reads)  # before the parent has any worker
reads()
in_child(reads)
in_child(reads_in_grandchild)

files.cool(path)
memory = np.zeros(len(data), np.uint8)
transfer = file.read_into(memory, wait=False)

def is_refused():
    for use in (transfer.wait, lambda: transfer.wait(timeout=0)):
        try:
            use()
        except gpunvme.Cancelled as error:
            assert "parent process" in str(error), error
        else:
            raise AssertionError("waited")
    str(transfer), transfer.path, transfer.reason, transfer.seconds, transfer.direct_bytes, transfer.done
    transfer.cancel()
    reads()  # and other reads are as good as ever

in_child(is_refused)
transfer.wait()
assert memory.tobytes() == data

before = path.stat().st_size
writer = gpunvme.open(path, "r+")
transfer = writer.write_from(bytes(32 << 20), before, wait=False)
in_child(is_refused)
transfer.wait()
assert path.stat().st_size == before + (32 << 20), "cut back by the child"
os.truncate(path, before)

print("ended")
"""


def test_forked_children_read_on_their_own(place: Path) -> None:
    """Data loaders fork: the parent's workers do not exist there, and their locks may be held for ever."""
    assert files.output(FORKING, place) == "ended\n"


FORKING_MEANWHILE = """
import os, sys, threading
import files, gpunvme
path = files.Path(sys.argv[1])
data = path.read_bytes()
file = gpunvme.open(path)
ended = threading.Event()

def read():
    while not ended.is_set():
        for nbytes in (1000, 200000, 3 << 20):
            assert file.read(77, nbytes).numpy().tobytes() == data[77 : 77 + nbytes]

threads = [threading.Thread(target=read) for _ in range(3)]
for thread in threads:
    thread.start()
for _ in range(25):
    child = os.fork()
    if child == 0:
        good = file.read(5, 300000).numpy().tobytes() == data[5:300005]
        os._exit(0 if good else 1)
    assert os.waitpid(child, 0)[1] == 0
ended.set()
for thread in threads:
    thread.join()
print("ended")
"""


def test_forking_while_other_threads_read(place: Path) -> None:
    """Whatever lock they hold at that moment is held in the child, for ever, unless it is made anew there."""
    assert files.output(FORKING_MEANWHILE, place) == "ended\n"


POOL = """
import multiprocessing, sys
import gpunvme
file = gpunvme.open(sys.argv[1])

def read(offset):
    return file.read(offset, 100000).numpy().tobytes()

if __name__ == "__main__":
    everything = file.read().numpy().tobytes()
    with multiprocessing.get_context("fork").Pool(3) as pool:
        offsets = list(range(0, 8 << 20, 99999))
        assert pool.map(read, offsets) == [everything[offset : offset + 100000] for offset in offsets]
    print("ended")
"""


def test_a_pool_of_processes(place: Path) -> None:
    assert files.output(POOL, place) == "ended\n"
