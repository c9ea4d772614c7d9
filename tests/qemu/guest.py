"""Guests: a QEMU with an IOMMU and NVMe controllers, a Debian kernel, and this machine's own programs.

A guest sees this machine's files read-only over 9p, beneath a layer in memory that takes what it writes; so the Python,
the package and the tests that run here run there. It starts in about 7 seconds, runs one program, leaves its
results in a shared folder and switches itself off. Everything is emulated (TCG): no privileges, no /dev/kvm.

`tools/guest-setup` fetches the kernels.
"""

from __future__ import annotations

import compileall
import contextlib
import ctypes
import itertools
import json
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gpunvme

REPOSITORY = Path(__file__).resolve().parent.parent.parent
# A guest's kernel that went down says so; what an emulator does that breaks off is nothing of the guest's.
DOWN = re.compile(r"Kernel panic|BUG:|Oops|general protection|Call Trace")
PARTS = REPOSITORY / "build" / "guest"
INSIDE = Path(__file__).resolve().parent / "inside"
DEBIAN, NEW, SECOND = "debian-6.1", "debian-new", "second"
LONG = os.environ.get("GPUNVME_TEST_LEVEL", "short") == "long"
# On a busy machine interrupts come late, and a kernel that checks its timer at boot believes that it does not work.
OPTIONS = "console=ttyS0 loglevel=4 log_buf_len=4M panic=-1 mitigations=off random.trust_cpu=on no_timer_check"
EARLY_MODULES = ("virtio_pci", "9pnet_virtio", "9p", "overlay")

# The guest's first program. It mounts this machine's files with a layer in memory on top, and goes on in there.
INIT = """\
#!/bin/busybox sh
b=/bin/busybox
stop() {{ $b echo "guest: $*" >/dev/console; $b echo o >/proc/sysrq-trigger; $b sleep 60; }}
$b mkdir -p /proc /sys /dev /host /layer /root
$b mount -t proc proc /proc
$b mount -t sysfs sys /sys
$b mount -t devtmpfs dev /dev
for module in {modules}; do
  [ ! -e /lib/modules/*/$module.ko ] || $b modprobe $module || stop "no module $module" # or it is built in
done
$b mount -t 9p -o ro,trans=virtio,version=9p2000.L,msize=262144,cache=loose host /host || stop "no root"
$b mount -t tmpfs layer /layer
$b mkdir /layer/files /layer/work
$b mount -t overlay -o lowerdir=/host,upperdir=/layer/files,workdir=/layer/work root /root || stop "no layer"
for kind in proc sysfs devtmpfs; do
  case $kind in devtmpfs) where=dev ;; sysfs) where=sys ;; *) where=$kind ;; esac
  $b mount -t $kind $kind /root/$where || stop "no /$where"
done
$b mount -t tmpfs run /root/run
$b mkdir -p /root/dev/shm /root/run/share /root/run/first /root/run/last /root/lib/modules
$b mount -t tmpfs shm /root/dev/shm
$b mount -t 9p -o trans=virtio,version=9p2000.L,msize=262144 share /root/run/share || stop "no share"
$b cp -r /lib/modules/* /root/lib/modules/
$b cp $b /root/run/busybox
for program in modprobe insmod rmmod; do $b ln -s /run/busybox /root/run/first/$program; done
for program in $($b --list); do $b ln -s /run/busybox /root/run/last/$program; done
$b echo /run/first/modprobe >/proc/sys/kernel/modprobe
exec $b switch_root /root /bin/sh /run/share/start
"""

START = """\
export PATH=/run/first:{tools}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin:/run/last
export HOME=/root LANG=C.UTF-8 PYTHONUNBUFFERED=1
{environment}
cd /
{command} >/run/share/output 2>&1 </dev/null
echo $? >/run/share/status
dmesg -s 4194304 >/run/share/dmesg
sync
echo o >/proc/sysrq-trigger
sleep 60
"""


class GuestError(Exception):
    """A guest did not do what it was started for; the message has its last words."""


class EmulatorError(GuestError):
    """QEMU ended in the middle of a guest's work, and the guest's kernel had said nothing that would explain it."""


def why_not() -> str:
    """Return why no guest can be started here, or nothing."""
    if platform.machine() != "x86_64":
        return "guests share this machine's programs: x86-64 only"
    if not shutil.which("qemu-system-x86_64"):
        return "qemu-system-x86_64 is not installed (apt-get install qemu-system-x86)"
    if not (PARTS / "done").exists():
        return "the guests' kernels are not here: run tools/guest-setup"
    return ""


# --- what QEMU starts with


def iommu() -> list[str]:
    """An IOMMU that the guest's VFIO works with: it sees every mapping at once and remaps interrupts."""
    return ["-device", "intel-iommu,intremap=on,caching-mode=on"]


def namespace(image: Path, name: str, *, bus: str, nsid: int, lba: int = 512, iops: int = 0) -> list[str]:
    """One namespace of the controller whose id is `bus`; ``iops``: no more commands a second than that."""
    drive = f"file={image},format=raw,if=none,id={name},cache=writeback"
    drive += f",throttling.iops-total={iops}" if iops else ""
    block = f"logical_block_size={lba},physical_block_size={lba}"
    return ["-drive", drive, "-device", f"nvme-ns,drive={name},bus={bus},nsid={nsid},{block}"]


def nvme(serial: str, address: str, *, bus: str = "pcie.0", **properties: str | int) -> list[str]:
    """An NVMe controller without a namespace, at a PCI address such as ``08.0``; its id is the serial number.

    Properties are QEMU's, with ``_`` as it writes them (``max_ioqpairs``, ``mdts``).
    """
    more = "".join(f",{key}={value}" for key, value in properties.items())
    return ["-device", f"nvme,id={serial},serial={serial},bus={bus},addr={address}{more}"]


@dataclass(frozen=True)
class Qemu:
    """A QEMU: the command that starts it."""

    command: tuple[str, ...] = ("qemu-system-x86_64",)
    environment: dict[str, str] = field(default_factory=dict)


def newer_qemu() -> Qemu:
    """The QEMU of `tools/guest-setup`, which has ``vfio-user-pci``, with the libraries that belong to it."""
    root = PARTS / "trixie"
    libraries = root / "usr/lib/x86_64-linux-gnu"
    loader = (str(libraries / "ld-linux-x86-64.so.2"), "--library-path", str(libraries))
    data = ("-L", str(root / "usr/share/qemu"), "-L", str(root / "usr/share/seabios"))
    modules = {"QEMU_MODULE_DIR": str(libraries / "qemu")}
    return Qemu((*loader, str(root / "usr/bin/qemu-system-x86_64"), *data), modules)


# --- starting


@dataclass(frozen=True)
class Report:
    """What a guest left behind."""

    status: int
    output: str
    dmesg: str
    console: str
    share: Path
    seconds: float


def run(
    command: list[str],
    share: Path,
    *,
    devices: list[str],
    kernel: str = DEBIAN,
    options: str = "intel_iommu=on",
    memory: str = "1G",
    qemu: Qemu | None = None,
    environment: dict[str, str] | None = None,
    timeout: float = 120,
) -> Report:
    """Start a guest, run a command of this machine in it as root, and return what it left.

    Parameters
    ----------
    command
        The command and its arguments; it runs in ``/``.
    share
        An empty folder of this machine; the guest sees it at ``/run/share`` and may write to it.
    devices
        QEMU's options for devices: `iommu`, `nvme`, `namespace`.
    kernel
        `DEBIAN` or `SECOND`.
    options
        The kernel's options.
    timeout
        Seconds until the guest is ended if it does not end by itself.

    Raises
    ------
    GuestError
        The guest did not get as far as the end of the command.
    EmulatorError
        The same, and it was QEMU that broke off.
    """
    share.mkdir(parents=True, exist_ok=True)
    passed = {name: os.environ[name] for name in ("PYTHONPATH", "GPUNVME_TEST_LEVEL", "CI") if name in os.environ}
    exports = "\n".join(f"export {key}={shlex.quote(value)}" for key, value in (passed | (environment or {})).items())
    (share / "start").write_text(START.format(tools=PARTS / "bin", environment=exports, command=shlex.join(command)))
    initramfs = share.with_name(share.name + ".initramfs")
    console = share.with_name(share.name + ".console")
    console.touch()
    initramfs.write_bytes(make_initramfs(PARTS / kernel))
    qemu = qemu or Qemu()
    arguments = [
        *qemu.command,
        *("-accel", "tcg", "-machine", "q35,kernel-irqchip=split", "-cpu", "max", "-smp", "2", "-m", memory),
        *("-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-serial", f"file:{console}"),
        *("-kernel", str(PARTS / kernel / "vmlinux"), "-initrd", str(initramfs)),
        *("-append", f"{OPTIONS} {options}"),
        *("-virtfs", "local,path=/,mount_tag=host,security_model=none,readonly=on,multidevs=remap"),
        *("-virtfs", f"local,path={share},mount_tag=share,security_model=none"),
        *devices,
    ]
    started = time.monotonic()
    late = False
    with subprocess.Popen(
        arguments,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, **qemu.environment},
        preexec_fn=_end_with_parent,  # noqa: PLW1509 - calls one system call, takes no lock
    ) as child:
        try:
            said, _ = child.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            late = True
            child.kill()
            said, _ = child.communicate()
        except BaseException:
            child.kill()
            raise
        finally:
            initramfs.unlink()

    def text(name: Path) -> str:
        with contextlib.suppress(FileNotFoundError):
            return name.read_text(errors="replace")
        return ""

    status = text(share / "status").strip()
    report = Report(
        status=int(status) if status else -1,
        output=text(share / "output"),
        dmesg=text(share / "dmesg"),
        console=text(console),
        share=share,
        seconds=time.monotonic() - started,
    )
    if not status:
        why = f"it was ended after {timeout} s" if late else f"QEMU ended with {child.returncode}"
        last = "\n".join([*report.console.splitlines()[-60:], *report.output.splitlines()[-30:], said[-2000:]])
        kind = GuestError if late or DOWN.search(report.console) or not report.output else EmulatorError
        raise kind(f"the guest did not finish its command: {why}. Its last words:\n{last}")
    return report


def _end_with_parent() -> None:
    """A guest does not outlive the tests (PR_SET_PDEATHSIG, prctl(2))."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)


# --- checks: many in one guest


@dataclass(frozen=True)
class Result:
    """How one check went, and what the kernel logged meanwhile."""

    passed: bool
    text: str
    dmesg: str
    seconds: float
    facts: dict[str, Any]


@dataclass(frozen=True)
class Checks:
    """The results of programs of `inside/`, by program and the name of the check."""

    report: Report
    results: dict[tuple[str, str], Result]

    def expect(self, program: str, name: str) -> Result:
        """Return a check's result; fail as it failed."""
        result = self.results.get((program, name))
        if result is None:
            raise GuestError(f"the check {name} did not run. The guest said:\n{self.report.output[-6000:]}")
        assert result.passed, f"in the guest:\n{result.text}\nthe kernel said meanwhile:\n{result.dmesg}"
        return result


def run_checks(
    programs: Sequence[str], folder: Path, *, devices: Callable[[Path], list[str]], **options: Any
) -> Checks:
    """Boot a guest that runs the checks of ``inside/PROGRAM.py``, of each program.

    Once more if the emulator breaks off: QEMU 7.2 was seen to end while it reported a DMA fault to the guest. A check
    that makes it do so fails all the same, the second time.

    Parameters
    ----------
    programs
        Their names.
    folder
        An empty folder of this machine for what the guest needs.
    devices
        Makes QEMU's options for devices, and their images in a folder.
    options
        As for `run`.
    """
    # Compiling modules takes seconds in there.
    for source in (Path(gpunvme.__file__).parent, INSIDE):
        compileall.compile_dir(source, quiet=2)
    command = [sys.executable, str(INSIDE / "run.py"), *programs]
    for attempt in ("first", "second"):
        place = folder / attempt
        place.mkdir(parents=True)
        try:
            report = run(command, place / "share", devices=devices(place), **options)
        except EmulatorError as error:
            if attempt == "second":
                raise
            print(f"QEMU is started again: {error}")
        else:
            break
    results = {}
    with contextlib.suppress(FileNotFoundError):
        for line in (report.share / "results").read_text().splitlines():
            entry = json.loads(line)
            key = entry.pop("program"), entry.pop("name")
            results[key] = Result(**entry)
    return Checks(report, results)


def checks_of(*programs: str) -> list[tuple[str, str]]:
    """Return programs and the names of their checks, without running them."""
    found = []
    for program in programs:
        source = (INSIDE / f"{program}.py").read_text().splitlines()
        for before, line in itertools.pairwise(source):
            if before.startswith("@check") and line.startswith("def "):
                found.append((program, line.removeprefix("def ").split("(")[0]))
    return found


# --- the initramfs


def make_initramfs(kernel: Path) -> bytes:
    """Return a cpio archive ("newc", Documentation/driver-api/early-userspace/buffer-format.rst) of `INIT`."""
    archive = Cpio()
    version = (kernel / "version").read_text()
    for folder in ("bin", "dev", "lib", "lib/modules", f"lib/modules/{version}"):
        archive.add(folder, 0o040755)
    archive.add("dev/console", 0o020600, device=(5, 1))
    archive.add("bin/busybox", 0o100755, (PARTS / "busybox").read_bytes())
    archive.add("init", 0o100755, INIT.format(modules=" ".join(EARLY_MODULES)).encode())
    for file in sorted((kernel / "modules").iterdir()):
        archive.add(f"lib/modules/{version}/{file.name}", 0o100644, file.read_bytes())
    return archive.finish()


class Cpio:
    """Writes a cpio archive."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._count = 0

    def add(self, name: str, mode: int, data: bytes = b"", device: tuple[int, int] = (0, 0)) -> None:
        self._count += 1
        encoded = name.encode() + b"\0"
        fields = (self._count, mode, 0, 0, 1, 0, len(data), 0, 0, *device, len(encoded), 0)
        head = b"070701" + b"".join(b"%08X" % value for value in fields) + encoded
        self._parts += [head, b"\0" * (-len(head) % 4), data, b"\0" * (-len(data) % 4)]

    def finish(self) -> bytes:
        self.add("TRAILER!!!", 0)
        return b"".join(self._parts)
