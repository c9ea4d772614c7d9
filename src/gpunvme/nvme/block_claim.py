"""A block device of the kernel's, taken for writing: nobody else uses it, and nothing on it is lost unawares."""

from __future__ import annotations

import errno
import os

from gpunvme.errors import UnsafeDeviceError, file_error
from gpunvme.nvme.safety import uses_of
from gpunvme.nvme.sysfs import Machine


def claim_block_device(path: str, machine: Machine | None = None) -> int:
    """Open a block device for writing so that nobody can mount it, swap to it or make it part of a volume meanwhile.

    Says nothing of what it holds: that is for whoever writes to look at.

    Parameters
    ----------
    path
        The device, a whole one or a partition.
    machine
        Where to look for who uses it.

    Returns
    -------
    int
        A descriptor, open exclusively for reading and writing; it belongs to the caller. The claim lasts until the last
        duplicate of it is closed.

    Raises
    ------
    UnsafeDeviceError
        If the kernel uses it: mounted, swap, part of a volume, or a partition of it is. No word allows that.
    FileError
        If the operating system refuses otherwise.
    """
    machine = machine or Machine()
    number = 0
    try:
        number = os.stat(path).st_rdev
        # The kernel's own lock, whoever the user is: open(2), O_EXCL on block devices.
        fd = os.open(path, os.O_RDWR | os.O_EXCL | os.O_CLOEXEC)
    except OSError as error:
        if error.errno != errno.EBUSY:
            raise file_error(error, "cannot open for writing", path) from None
        fd = -1
    name = machine.link(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}") or os.path.basename(path)
    uses = [str(hazard) for hazard in uses_of(name, machine)]
    if fd >= 0 and not uses:
        return fd
    if fd >= 0:
        os.close(fd)
    uses = uses or [f"{name} is in use by the kernel: find out by what, with lsblk {path}, and stop it"]
    raise UnsafeDeviceError(f"{path} is left alone:\n  " + ";\n  ".join(uses))
