"""NVMe queues that a GPU drives, against the software controller: kernels that hang or fail, and other processes.

On a real GPU with ``-m gpu``; on the emulated one, smaller, by tests/soft/test_emulated_gpu_queues.py. If this failed,
one program's end would be another one's.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from gpu_queue_machine import (
    BLOCK,
    CHILD,
    GPU,
    HUNG,
    MARKS,
    PRELUDE,
    SIZE,
    few,
    rows_of,
    served,
    some_lbas,
)

from gpunvme import nvme
from gpunvme.memory import Buffer

pytestmark = MARKS


HANGING_PROGRAM = """
import sys, time
import gpunvme
from gpunvme import nvme
from gpunvme.gpu.driver import Gpu
controller = nvme.open("soft:ram?size=1MiB&queues=8", queues=2)
queues = controller.namespace().gpu_queues(0, count=2, depth=16)
kernel = gpunvme.gpu.compile(sys.argv[1]).kernel("run")
host, device = Gpu(0).allocate_host(4096)
kernel.launch(1, 32, queues, device, stream=0)
start = time.monotonic()
try:
    queues.close(timeout=1)
except gpunvme.DeadlineExceeded as error:
    assert "still runs" in str(error), error
else:
    sys.exit("close() did not say that a kernel hangs")
assert time.monotonic() - start < 10
assert controller.namespace().read(0, 8).nbytes == 4096  # the driver's own queues work on
controller.close()
print("closed", flush=True)
import ctypes
ctypes.c_uint32.from_address(host).value = 1
"""


def test_a_kernel_that_hangs_cannot_make_close_hang(stored: bytes) -> None:
    child = subprocess.run(
        [sys.executable, "-c", CHILD + HANGING_PROGRAM, PRELUDE + HUNG],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert child.stdout == "closed\n", child.stderr


FAILING_PROGRAM = """
import gpunvme
from gpunvme import nvme
from gpunvme.memory import Buffer
controller = nvme.open("soft:ram?size=1MiB&queues=8", queues=2)
namespace = controller.namespace()
queues = namespace.gpu_queues(0, count=2, depth=16)
array = queues.cached_array("u1", capacity_bytes=1 << 20)
out = Buffer.empty(512, "cuda:0")
array.pin(0, 4096)
array.gather([0], out, stream=0)
trap = gpunvme.gpu.compile('extern "C" __global__ void run() { __trap(); }').kernel("run")
trap.launch(1, 32, stream=0)
try:
    queues.gather([0], out, stream=0)
except gpunvme.CudaError as error:
    print("gather:", type(error).__name__)
assert namespace.read(0, 8).nbytes == 4096  # the driver's own queues work on
array.close()
queues.close()
controller.close()
print("closed", flush=True)
"""


def test_a_kernel_that_fails_is_an_error_and_closing_works(stored: bytes) -> None:
    child = subprocess.run(
        [sys.executable, "-c", CHILD + FAILING_PROGRAM], capture_output=True, text=True, timeout=60, check=False
    )
    assert child.stdout == "gather: CudaError\nclosed\n", child.stderr


@pytest.mark.parametrize("doorbells", ["map", "messages"])
def test_a_controller_in_another_process(tmp_path: Path, stored: bytes, doorbells: str) -> None:
    with served(tmp_path / "socket", doorbells) as uri, nvme.open(uri, queues=2) as controller:
        namespace = controller.namespace()
        namespace.write_from(stored)
        with namespace.gpu_queues(0, count=4, depth=50) as queues:
            assert queues.doorbell == ("direct" if doorbells == "map" else "forward")
            lbas = some_lbas(namespace, 500, 8)
            out = Buffer.empty(500 * 8 * BLOCK, GPU)
            queues.gather(lbas, out)
            assert out.numpy().tobytes() == rows_of(stored, lbas, 8)
            whole = Buffer.empty(SIZE, GPU)
            queues.stream(0, SIZE, whole)
            assert whole.numpy().tobytes() == stored


KILLED_PROGRAM = """
import sys
import gpunvme
from gpunvme import nvme
from gpunvme.memory import Buffer
controller = nvme.open(sys.argv[1], queues=2)
namespace = controller.namespace()
queues = namespace.gpu_queues(0, count=4, timeout=60)
print("spinning", flush=True)
while True:
    queues.gather(range(1000), Buffer.empty(1000 * 512, "cuda:0"))
"""


def test_a_process_that_is_killed_while_its_kernel_runs_harms_nobody(tmp_path: Path, stored: bytes) -> None:
    with served(tmp_path / "socket") as uri:
        for _ in range(few(2, 1)):
            child = subprocess.Popen(
                [sys.executable, "-c", CHILD + KILLED_PROGRAM, uri], stdout=subprocess.PIPE, text=True
            )
            assert child.stdout is not None
            with child, child.stdout:
                assert child.stdout.readline() == "spinning\n"
                time.sleep(0.2)
                os.kill(child.pid, signal.SIGKILL)
        with nvme.open(uri, queues=2) as controller:
            namespace = controller.namespace()
            namespace.write_from(stored)
            with namespace.gpu_queues(0, count=4) as queues:
                whole = Buffer.empty(SIZE, GPU)
                queues.stream(0, SIZE, whole)
                assert whole.numpy().tobytes() == stored
