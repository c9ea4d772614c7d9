"""Which file system a path lies on, from /proc/self/mountinfo."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

NETWORK = frozenset({"nfs", "nfs4", "cifs", "smb3", "ceph", "fuse.sshfs", "glusterfs", "lustre", "gpfs", "9p"})
IN_MEMORY = frozenset({"tmpfs", "ramfs", "devtmpfs", "hugetlbfs"})


@dataclass(frozen=True)
class Mount:
    """One line of mountinfo: where, what kind, from which device, with which options."""

    mount_id: int
    device_number: str
    mount_point: str
    kind: str
    source: str
    options: str

    @property
    def in_memory(self) -> bool:
        """Whether files here live in memory, without a drive."""
        return self.kind in IN_MEMORY

    @property
    def remote(self) -> bool:
        """Whether another machine keeps the files."""
        return self.kind in NETWORK


def _unescape(text: str) -> str:
    """Undo mountinfo's octal escapes of blanks and backslashes."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), text)


def parse_mountinfo(text: str) -> list[Mount]:
    """Return the mounts that mountinfo lists, in its order; lines that make no sense are left out."""
    mounts = []
    for line in text.splitlines():
        left, separator, right = line.partition(" - ")
        head, tail = left.split(), right.split()
        if not separator or len(head) < 6 or len(tail) < 2:
            continue
        # Options of the mount come first, then those of the file system; a user wants to see both once.
        options = dict.fromkeys([*head[5].split(","), *(tail[2].split(",") if len(tail) > 2 else [])])
        mounts.append(
            Mount(
                mount_id=int(head[0]),
                device_number=head[2],
                mount_point=_unescape(head[4]),
                kind=tail[0],
                source=_unescape(tail[1]),
                options=",".join(options),
            )
        )
    return mounts


def mount_of(path: str, mounts: list[Mount], mount_id: int | None = None) -> Mount | None:
    """Return the mount that a path lies on.

    Parameters
    ----------
    path
        An absolute path without symbolic links.
    mounts
        The mounts, in mountinfo's order.
    mount_id
        The mount's number if it is known (``mnt_id`` in fdinfo): exact even where mounts hide each other.

    Returns
    -------
    Mount or None
        The mount, or None if none matches.
    """
    for mount in mounts:
        if mount.mount_id == mount_id:
            return mount
    best: Mount | None = None
    for mount in mounts:
        point = mount.mount_point.rstrip("/")
        beneath = path == mount.mount_point or path.startswith(point + "/")
        # A later line of the same length hides the earlier one.
        if beneath and (best is None or len(mount.mount_point) >= len(best.mount_point)):
            best = mount
    return best


def mount_id_of(fd: int) -> int | None:
    """Return the number of the mount that an open file lies on, or None if the kernel does not tell."""
    try:
        with open(f"/proc/self/fdinfo/{fd}") as lines:
            for line in lines:
                if line.startswith("mnt_id:"):
                    return int(line.split()[1])
    except (OSError, ValueError):
        return None
    return None


def real_mount_of(path: str, mountinfo: str) -> Mount | None:
    """Return the mount that a path of this machine lies on, by the number that the kernel gives.

    Parameters
    ----------
    path
        Any existing path.
    mountinfo
        The text of ``/proc/self/mountinfo``.
    """
    resolved = os.path.realpath(path)
    number: int | None = None
    try:
        fd = os.open(resolved, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        pass
    else:
        try:
            number = mount_id_of(fd)
        finally:
            os.close(fd)
    return mount_of(resolved, parse_mountinfo(mountinfo), number)
