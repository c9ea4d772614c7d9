"""A process that writes to the drive until it is killed. ``python -m gpunvme.accept.steps.killed PARENT``."""

from __future__ import annotations

import sys

import numpy as np

from gpunvme import nvme
from gpunvme.accept.child import end_with
from gpunvme.accept.job import Job

VALUE = 0x5A


def main(parent: int) -> None:
    """Write the test area once, say so, go on."""
    end_with(parent)
    job = Job.decode(sys.stdin.readline())
    controller = nvme.open(job.uri)
    namespace = controller.namespace(job.nsid)
    data = np.full(job.area_nbytes, VALUE, np.uint8)
    first = job.area // job.block_size
    namespace.write_from(data, first)
    namespace.flush()
    print("written", flush=True)
    while True:
        namespace.write_from(data, first)


if __name__ == "__main__":
    main(int(sys.argv[1]))
