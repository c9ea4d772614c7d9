"""The ``cufile/…`` paths: GPUDirect Storage through NVIDIA's library, in the three ways that it can go.

Which of them cuFile takes is cuFile's decision. Before a transfer this says which it can be, from what the machine
says; after it the transfer says which it was, from what was counted (`cufile.evidence`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from gpunvme import _native
from gpunvme.memory import Device
from gpunvme.paths.base import OpenMovement, Order, Source, Verdict
from gpunvme.paths.host import HostPath

if TYPE_CHECKING:
    from gpunvme.cufile.driver import Driver
    from gpunvme.cufile.facts import Place

NVIDIA_FS, P2PDMA, COMPAT = NAMES = ("cufile/nvidia-fs", "cufile/p2pdma", "cufile/compat")


class CufilePath:
    """One of the ways; `strictly` makes one that fails where cuFile took another.

    Parameters
    ----------
    name
        Its name.
    host
        Carries what cuFile must not: see `cufile.movement.CufileMovement`.
    strict
        Whether a transfer that another path carried fails.
    """

    def __init__(self, name: str, host: HostPath, strict: bool = False) -> None:
        self.name = name
        self._host = host
        self._strict = strict

    def strictly(self) -> CufilePath:
        """The same, for who asked for it by name."""
        return CufilePath(self.name, self._host, strict=True)

    def installed(self, file: Source) -> Verdict:
        """Say whether it can be used at all for a file, whichever the device; opens nothing."""
        if not isinstance(file, _native.SourceFile):
            return Verdict(self.name, False, "a namespace that this process drives is no file of the kernel's")
        from gpunvme.cufile import library

        missing = library.why_absent() or _native.cuda_unavailable_reason()
        return Verdict(self.name, not missing, missing or "cuFile is installed")

    def verdict(self, file: Source, device: Device) -> Verdict:
        """Say whether cuFile would take this way, from what the machine says; the driver is not opened for it."""
        if not device.is_gpu:
            return Verdict(self.name, False, "GPUDirect Storage is for GPU memory")
        installed = self.installed(file)
        if not installed.usable or not isinstance(file, _native.SourceFile):
            return installed
        count = len(_native.cuda_devices())
        if device.index >= count:
            return Verdict(self.name, False, f"there is no {device}: the driver sees {count} GPU(s)")
        from gpunvme.cufile import driver, facts, ways

        if driver.problem():
            return Verdict(self.name, False, driver.problem())
        opened, place = driver.if_open(), facts.place_of(file.fileno())
        reasons = {
            NVIDIA_FS: ways.why_no_nvidia_fs(file, place, opened),
            P2PDMA: ways.why_no_p2pdma(file, place, opened),
        }
        if self.name in reasons:
            reason = reasons[self.name]
            return Verdict(self.name, not reason, reason or _how(self.name, place, opened))
        direct = next((name for name, reason in reasons.items() if not reason), None)
        if direct:
            return Verdict(
                self.name, False, f"cuFile goes by {direct} here, unless CUFILE_FORCE_COMPAT_MODE=true is set"
            )
        reason = ways.why_no_compat(place, opened)
        if reason:
            return Verdict(self.name, False, reason)
        return Verdict(self.name, True, _how(self.name, place, opened))

    def open(self) -> None:
        """Open the driver, so that verdicts rest on what it says.

        Raises
        ------
        PathError
            If it cannot be opened.
        """
        from gpunvme.cufile import driver

        driver.driver()

    def speed(self, file: Source, device: Device, *, gather: bool = False) -> float | None:
        """What is measured of it is on record: see `measured`."""
        return None

    def begin(self, order: Order) -> OpenMovement:
        """Begin a transfer."""
        from gpunvme.cufile.movement import CufileMovement

        return CufileMovement(order, self.name, self._strict, self._host)


def _how(name: str, place: Place, opened: Driver | None) -> str:
    from gpunvme.cufile import facts

    if name == NVIDIA_FS:
        how = f"nvidia-fs {facts.nvidia_fs()}, {place}" + (f"; {place.rdma}" if place.rdma else "")
    elif name == P2PDMA:
        how = f"the kernel's P2PDMA, {place}"
    else:
        how = "through host memory: nothing better is there for cuFile"
    if opened is None:
        missing = facts.missing_from_udev(place)
        warning = f"; it may refuse the file: {missing}" if missing else ""
        return f"{how}; the driver is not open yet{warning}"
    return f"{how}; {opened}" + (f"; {opened.no_statistics}" if opened.no_statistics else "")
