"""A controller's registers, and the steps from reset to ready and back (Base 2.0, sections 3.1.3, 3.5.1 and 3.6.1)."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import TYPE_CHECKING

from gpunvme.errors import ControllerError, DeviceGoneError
from gpunvme.nvme import spec
from gpunvme.nvme.spec.layout import BitFields

if TYPE_CHECKING:
    from gpunvme.nvme.transport import Transport

# How long a shutdown may take where the controller names no time of its own (RTD3E), in seconds.
_SHUTDOWN_SECONDS = 5.0
_WIDE = {spec.Register[name] for name in ("CAP", "ASQ", "ACQ", "BPMBL", "CMBMSC")}  # 8 bytes
# What the bits of registers are called.
_FIELDS: dict[str, type[BitFields]] = {
    "CAP": spec.Cap,
    "VS": spec.Version,
    "CC": spec.Cc,
    "CSTS": spec.Csts,
    "AQA": spec.Aqa,
    "CRTO": spec.Crto,
    "CMBLOC": spec.Cmbloc,
    "CMBSZ": spec.Cmbsz,
    "CMBMSC": spec.Cmbmsc,
    "CMBSTS": spec.Cmbsts,
    "BPINFO": spec.Bpinfo,
    "PMRCAP": spec.Pmrcap,
    "PMRSTS": spec.Pmrsts,
}


def check_alive(csts: int, what: str) -> None:
    """Raise if CSTS says that the controller is gone or has failed.

    Raises
    ------
    DeviceGoneError
        If it reads all ones, as registers of absent devices do.
    ControllerError
        If CSTS.CFS, Controller Fatal Status, is set.
    """
    if csts == spec.ALL_ONES_32:
        raise DeviceGoneError(f"{what}: the controller is gone, its registers read all ones")
    if spec.Csts.decode(csts).cfs:
        raise ControllerError(f"{what}: the controller reports a fatal status (CSTS.CFS); it needs a reset")


class Registers:
    """Access to CAP, VS, CC, CSTS and the admin queue's registers of one controller."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        raw = self._read64(spec.Register.CAP)
        if raw == spec.ALL_ONES_64:
            raise DeviceGoneError(f"{transport.uri}: there is no controller, its registers read all ones")
        self.cap = spec.Cap.decode(raw)
        self.vs = spec.Version.decode(self._read32(spec.Register.VS))

    def _read32(self, register: int) -> int:
        return self._transport.read_register(register, 4)

    def _read64(self, register: int) -> int:
        return self._transport.read_register(register, 8)

    @property
    def csts(self) -> int:
        """Controller Status, as read."""
        return self._read32(spec.Register.CSTS)

    @property
    def cc(self) -> int:
        """Controller Configuration, as read."""
        return self._read32(spec.Register.CC)

    def dump(self) -> dict[str, int]:
        """Every register that this controller has, by name, as it reads now.

        Doorbells are left out: what reading them returns is the vendor's choice (NVMe over PCIe 1.0, 3.1.2).
        """
        return {each.name: self._read64(each) if each in _WIDE else self._read32(each) for each in self._present()}

    def _present(self) -> list[spec.Register]:
        """Registers that a controller of this version and with these capabilities has, in BAR0's order."""
        cap, register = self.cap, spec.Register
        optional = {
            (register.NSSR,): cap.nssrs,
            (register.CMBLOC, register.CMBSZ): (self.vs.mjr, self.vs.mnr) >= (1, 2),  # reserved before
            (register.BPINFO, register.BPRSEL, register.BPMBL): cap.bps,
            (register.CMBMSC, register.CMBSTS, register.CMBEBS, register.CMBSWTP): cap.cmbs,
            (register.NSSD,): cap.nsss,
            (register.CRTO,): cap.crms,
            tuple(each for each in register if each.name.startswith("PMR")): cap.pmrs,
        }
        absent = {each for group, has in optional.items() if not has for each in group}
        return [each for each in register if each not in absent and each != register.DOORBELLS]

    def decoded(self) -> dict[str, dict[str, int]]:
        """Fields of those registers that have any."""
        values = self.dump()
        read = {name: kind.decode(values[name]) for name, kind in _FIELDS.items() if name in values}
        return {name: {field: getattr(value, field) for field in value.PLACES} for name, value in read.items()}

    def check_alive(self) -> None:
        """Raise `DeviceGoneError` or `ControllerError` if the controller is gone or has failed."""
        check_alive(self.csts, self._transport.uri)

    def disable(self) -> None:
        """Clear CC.EN and wait until CSTS.RDY is 0: the controller has forgotten its queues and does no DMA.

        Raises
        ------
        ControllerError
            If it takes longer than CAP.TO.
        """
        cc = self.cc
        if cc == spec.ALL_ONES_32:
            raise DeviceGoneError(f"{self._transport.uri}: the controller is gone, its registers read all ones")
        if cc & 1:
            # CC.EN may not change before CSTS.RDY has followed it (section 3.1.3.5), unless the controller has failed.
            self._wait_ready(True, "it was being enabled", accept_failed=True)
            self._transport.write_register(spec.Register.CC, 4, cc & ~1)
        self._wait_ready(False, "it was disabled", accept_failed=True)

    def enable(self, page_exponent: int, depth: int, submissions: int, completions: int) -> None:
        """Hand over the admin queue, set CC.EN and wait until CSTS.RDY is 1.

        Parameters
        ----------
        page_exponent
            CC.MPS: the page size is 2^(12 + this).
        depth
            Entries of the admin queues.
        submissions, completions
            Their IOVAs.

        Raises
        ------
        ControllerError
            If it takes longer than CAP.TO, or the controller fails.
        """
        sizes = spec.Aqa(depth - 1, depth - 1)
        self._transport.write_register(spec.Register.AQA, 4, sizes.encode())
        self._transport.write_register(spec.Register.ASQ, 8, submissions)
        self._transport.write_register(spec.Register.ACQ, 8, completions)
        cc = spec.Cc(en=1, mps=page_exponent, iosqes=spec.SQE_EXPONENT, iocqes=spec.CQE_EXPONENT)
        self._transport.write_register(spec.Register.CC, 4, cc.encode())
        self._wait_ready(True, "it was enabled")

    def shut_down(self, seconds: float = _SHUTDOWN_SECONDS) -> bool:
        """Tell the controller to prepare for loss of power; whether it said that it has, in time."""
        cc = self.cc
        if cc == spec.ALL_ONES_32 or not cc & 1:
            return cc != spec.ALL_ONES_32
        asked = replace(spec.Cc.decode(cc), shn=spec.Shutdown.NORMAL)
        self._transport.write_register(spec.Register.CC, 4, asked.encode())
        give_up = time.monotonic() + seconds
        while time.monotonic() < give_up:
            csts = self.csts
            if csts == spec.ALL_ONES_32:
                return False
            if spec.Csts.decode(csts).shst == spec.ShutdownStatus.COMPLETE:
                return True
            time.sleep(0.0005)
        return False

    def _wait_ready(self, ready: bool, why: str, *, accept_failed: bool = False) -> None:
        # CAP.TO counts in 500 ms; some controllers say 0 and mean "quickly".
        limit = max(self.cap.to, 1) * 0.5
        start = time.monotonic()
        pause = 0.0
        while True:
            csts = self.csts
            if csts == spec.ALL_ONES_32 or not accept_failed:
                check_alive(csts, self._transport.uri)
            status = spec.Csts.decode(csts)
            if status.rdy == ready or (ready and accept_failed and status.cfs):
                return
            if time.monotonic() - start > limit:
                raise ControllerError(
                    f"{self._transport.uri}: CSTS.RDY is still {int(status.rdy)}, {limit:.1f} s after {why}; "
                    f"the controller allows itself no more (CAP.TO). Reset or power-cycle it"
                )
            time.sleep(pause)
            pause = min(0.005, pause + 0.0001)
