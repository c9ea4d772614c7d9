"""What must be true before a controller is taken from the kernel: nobody uses it, and nothing on it would be lost.

Two kinds of hazards. A device *in use by the kernel* (mounted, swap, part of a volume) is never taken: first it must be
put out of use. A device that *holds data*, or that a process has open, is taken only when the caller repeats its PCI
address as ``overwrite``: a word that nobody types by accident, and that no script carries over to another device.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import stat
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Self

from gpunvme.errors import TransportError, UnsafeDeviceError
from gpunvme.nvme.signatures import CATALOG, find_signatures, in_words
from gpunvme.nvme.sysfs import Machine, controller_name, namespace_names, parse_bdf

# What a machine starts from. Wherever one of these lies is called the boot disk.
_BOOT = frozenset({"/", "/boot", "/boot/efi", "/efi", "/usr"})
_BLKID_SECONDS = 30


@dataclass(frozen=True)
class Hazard:
    """One reason to leave a device alone.

    ``device`` is the block device or partition, ``fact`` what was found there, ``remedy`` how to go on. ``final``:
    no word of the caller's allows it.
    """

    device: str
    fact: str
    remedy: str
    final: bool

    def __str__(self) -> str:
        return f"{self.device} {self.fact}: {self.remedy}"


class Claim:
    """A controller's namespaces, held so that nobody can mount them, and what is in the way of taking them.

    A context manager: while it is open, every namespace is open exclusively, which fails for whoever wants to mount it,
    swap to it or make it part of a volume. The kernel's driver can be unbound meanwhile; so nothing can get in between
    looking and taking.

    Parameters
    ----------
    bdf
        PCI address of a controller.
    machine
        Where to look.
    """

    def __init__(self, bdf: str, machine: Machine | None = None) -> None:
        self.address = parse_bdf(bdf)
        self._machine = machine or Machine()
        self.namespaces = tuple(namespace_names(self.address, self._machine))
        self._held = ExitStack()
        try:
            self.hazards = tuple(self._look())
        except BaseException:
            self._held.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._held.close()

    def check(self, overwrite: str | None = None) -> None:
        """Raise if anything is in the way.

        Parameters
        ----------
        overwrite
            The controller's PCI address, as `gpunvme nvme list` shows it, to take it although it holds data or a
            process has it open.

        Raises
        ------
        UnsafeDeviceError
            With every hazard that remains.
        """
        said = overwrite == self.address
        left = [hazard for hazard in self.hazards if hazard.final or not said]
        if not left:
            return
        lines = [str(hazard) for hazard in left]
        if overwrite is not None and not said:
            lines.append(f"overwrite={overwrite!r} is not this device: it is {self.address}")
        if any(not hazard.final for hazard in left):
            also = ", and what is in use stays refused" if any(hazard.final for hazard in left) else ""
            lines.append(f'to take it all the same and risk what is on it: overwrite="{self.address}"{also}')
        raise UnsafeDeviceError(f"{self.address} is left alone:\n  " + ";\n  ".join(lines))

    def _look(self) -> Iterator[Hazard]:
        machine = self._machine
        for name in self.namespaces:
            tree = device_tree(name, machine)
            in_use = uses_of(name, machine)
            yield from in_use
            # Before our own descriptor is one of those that are open.
            yield from _open_files(self.address, name, tree, machine)
            yield from self._hold(name, bool(in_use))
        if not self.namespaces and controller_name(self.address, machine):
            yield from _open_files(self.address, "", {}, machine)

    def _hold(self, name: str, known: bool) -> Iterator[Hazard]:
        """Open a namespace exclusively and look at what it holds."""
        device = self._machine.path(f"/dev/{name}")
        try:
            fd = os.open(device, os.O_RDONLY | os.O_EXCL | os.O_CLOEXEC)
        except PermissionError as error:
            raise TransportError(f"{device} cannot be opened to see what it holds: run this as root") from error
        except OSError as error:
            if error.errno != errno.EBUSY:
                text = f"cannot be looked at ({error.strerror})"
                yield Hazard(name, text, f"see that {device} can be read, or that the namespace is healthy", True)
            elif not known:
                # Whatever else claims block devices: ZFS, bcache, a target driver, another container's mount.
                yield Hazard(
                    name, "is in use by the kernel", f"find out by what, with lsblk {device}, and stop it", True
                )
            return
        self._held.callback(os.close, fd)
        size = os.lseek(fd, 0, os.SEEK_END)
        try:
            signatures = find_signatures(lambda offset, nbytes: _read(fd, offset, nbytes), size)
        except OSError as error:
            yield Hazard(name, f"cannot be read ({error.strerror})", "see dmesg", True)
            return
        # Catalogs are there to be read in user space, and are looked for again before anything is written (`guard`).
        found = in_words(each for each in signatures if each.kind != CATALOG) or _ask_blkid(str(device))
        if found:
            yield Hazard(
                name, f"holds {found}", f"look at it with lsblk -f; if it may go: wipefs --all {device}", False
            )


def check_safe(bdf: str, overwrite: str | None = None, machine: Machine | None = None) -> None:
    """Raise if a controller must not be taken from the kernel. See `Claim.check`."""
    with Claim(bdf, machine) as claim:
        claim.check(overwrite)


def _read(fd: int, offset: int, nbytes: int) -> bytes:
    parts = []
    while nbytes:
        part = os.pread(fd, nbytes, offset)
        if not part:
            break
        parts.append(part)
        offset += len(part)
        nbytes -= len(part)
    return b"".join(parts)


# --- what lies on a block device


def device_tree(name: str, machine: Machine) -> dict[str, str]:
    """Return a block device, its partitions, and every volume built on them: names, each with its major:minor."""
    found: dict[str, str] = {}
    waiting = [name]
    while waiting:
        each = waiting.pop()
        if each in found:
            continue
        where = f"/sys/class/block/{each}"
        found[each] = machine.read(f"{where}/dev") or ""
        waiting += machine.names(f"{where}/holders")
        waiting += [entry for entry in machine.names(where) if machine.exists(f"{where}/{entry}/partition")]
    return dict(sorted(found.items()))


def uses_of(name: str, machine: Machine) -> list[Hazard]:
    """Return what the kernel uses a block device, its partitions and the volumes on them for."""
    tree = device_tree(name, machine)
    return [*_mounts(tree, machine), *_swaps(tree, machine), *_holders(tree, machine)]


def _volume(name: str, machine: Machine) -> str:
    """Return a name with what a volume is called: ``dm-0 (vg-root)``."""
    called = machine.read(f"/sys/class/block/{name}/dm/name")
    return f"{name} ({called})" if called else name


def _unescape(text: str) -> str:
    """Undo the octal escapes of blanks and backslashes in /proc (proc(5))."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), text)


def _mountinfos(machine: Machine) -> Iterator[tuple[str, str]]:
    """Return the mounts of every mount namespace that can be seen, ours first: whose, and the text."""
    seen = {machine.link("/proc/self/ns/mnt")}
    yield "", machine.read("/proc/self/mountinfo") or ""
    for process in filter(str.isdigit, machine.names("/proc")):
        namespace = machine.link(f"/proc/{process}/ns/mnt")
        if namespace is not None and namespace not in seen:
            seen.add(namespace)
            yield _process(process, machine), machine.read(f"/proc/{process}/mountinfo") or ""


def _mounts(tree: dict[str, str], machine: Machine) -> Iterator[Hazard]:
    numbers = {number: name for name, number in tree.items() if number}
    found: dict[tuple[str, str], Hazard] = {}
    for whose, text in _mountinfos(machine):
        for line in text.splitlines():
            left, _, right = line.partition(" - ")
            head, tail = left.split(), right.split()
            if len(head) < 6 or len(tail) < 2:
                continue
            source = os.path.basename(_unescape(tail[1])) if tail[1].startswith("/dev/") else ""
            # Btrfs gives its files a device number of their own; its source still names one of its devices.
            device = numbers.get(head[2]) or (source if source in tree else _mapped(source, tree, machine))
            if device:
                _note_mount(found, device, _unescape(head[4]), tail[0], whose, machine)
    yield from found.values()
    yield from _btrfs(tree, {device for device, _ in found}, machine)


def _note_mount(
    found: dict[tuple[str, str], Hazard], device: str, point: str, kind: str, whose: str, machine: Machine
) -> None:
    # Services with mounts of their own (udevd is one) have copies of ours, which go when ours go.
    if whose and (device, "boot" if point in _BOOT else point) in found:
        return
    by = f" for {whose}" if whose else ""
    fact, remedy = f"is mounted at {point} ({kind}){by}", f"umount {point}"
    if whose:
        remedy = f"stop {whose}, or unmount it there"
    elif point in _BOOT:
        fact, remedy = f"is the boot disk: {point} is mounted from it", "use another drive, or boot from another one"
    key = (device, "boot" if point in _BOOT and not whose else point + by)
    found.setdefault(key, Hazard(_volume(device, machine), fact, remedy, True))


def _mapped(source: str, tree: dict[str, str], machine: Machine) -> str:
    """Return the device of the tree that is called ``source`` in /dev/mapper, or nothing."""
    names = (name for name in tree if source and machine.read(f"/sys/class/block/{name}/dm/name") == source)
    return next(names, "")


def _btrfs(tree: dict[str, str], known: set[str], machine: Machine) -> Iterator[Hazard]:
    # Of a Btrfs on several devices mountinfo names only one.
    for uuid in machine.names("/sys/fs/btrfs"):
        for device in machine.names(f"/sys/fs/btrfs/{uuid}/devices"):
            if device in tree and device not in known:
                yield Hazard(device, f"belongs to the mounted Btrfs {uuid}", f"umount it: findmnt UUID={uuid}", True)


def _swaps(tree: dict[str, str], machine: Machine) -> Iterator[Hazard]:
    for line in (machine.read("/proc/swaps") or "").splitlines()[1:]:
        path = _unescape(line.split()[0])
        name = os.path.basename(path)
        device = name if name in tree else _mapped(name, tree, machine)
        if device and path.startswith("/dev/"):
            yield Hazard(_volume(device, machine), "is used as swap", f"swapoff {path}", True)


def _holders(tree: dict[str, str], machine: Machine) -> Iterator[Hazard]:
    for name in tree:
        for holder in machine.names(f"/sys/class/block/{name}/holders"):
            called = machine.read(f"/sys/class/block/{holder}/dm/name")
            kind, remedy = "volume", f"stop it: lsblk /dev/{name} shows what it is"
            if called is not None:
                kind, remedy = "device-mapper or LVM volume", f"dmsetup remove {called}, or vgchange -an for LVM"
            elif machine.exists(f"/sys/class/block/{holder}/md"):
                kind, remedy = "RAID", f"mdadm --stop /dev/{holder}"
            yield Hazard(name, f"is part of the {kind} {_volume(holder, machine)}", remedy, True)


def _open_files(address: str, name: str, tree: dict[str, str], machine: Machine) -> Iterator[Hazard]:
    """Find processes that have a device of the tree open, or the character devices of controller and namespace."""
    devices = {(stat.S_IFBLK, number): device for device, number in tree.items() if number}
    characters = {"nvme-generic": name.replace("nvme", "ng", 1)} if name else {}
    characters["nvme"] = controller_name(address, machine) or ""
    for folder, device in characters.items():
        if device and (at := machine.read(f"/sys/class/{folder}/{device}/dev")):
            devices[stat.S_IFCHR, at] = device
    names = set(devices.values())
    holders: dict[str, list[str]] = {}
    for process in filter(str.isdigit, machine.names("/proc")):
        for entry in machine.names(f"/proc/{process}/fd"):
            behind = _device_behind(f"/proc/{process}/fd/{entry}", devices, names, machine)
            if behind and _process(process, machine) not in holders.setdefault(behind, []):
                holders[behind].append(_process(process, machine))
    for device, processes in holders.items():
        yield Hazard(device, f"is open in {', '.join(processes)}", "end it, or let it close the device", False)


def _device_behind(name: str, devices: dict[tuple[int, str], str], names: set[str], machine: Machine) -> str | None:
    try:
        target = os.readlink(machine.path(name))
        if not target.startswith("/"):
            return None  # a socket, a pipe
        if target.startswith("/dev/") and target[5:] in names:
            return target[5:]
        # In a container the same device may have another name.
        status = os.stat(machine.path(name))
    except OSError:
        return None
    number = f"{os.major(status.st_rdev)}:{os.minor(status.st_rdev)}"
    return devices.get((stat.S_IFMT(status.st_mode), number))


def _process(number: str, machine: Machine) -> str:
    return f"process {number} ({machine.read(f'/proc/{number}/comm') or 'unknown'})"


def _ask_blkid(device: str) -> str:
    """Ask blkid(8) what it sees on a device, for formats that `signatures` does not know; empty if nothing."""
    program = shutil.which("blkid", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
    if program is None:
        return ""
    try:
        done = subprocess.run(
            [program, "--probe", "--output", "export", device],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_BLKID_SECONDS,
            check=False,
            stdin=subprocess.DEVNULL,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    if done.returncode == 8:  # several formats at once
        return "something that blkid cannot tell apart"
    answers = dict(line.split("=", 1) for line in done.stdout.splitlines() if "=" in line)
    words = [answers[key] for key in ("PTTYPE", "TYPE") if key in answers]
    return f"what blkid calls {' and '.join(words)}" if words else ""
