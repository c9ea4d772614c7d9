"""The ``p2pdma`` path: O_DIRECT into and out of PCI memory that this process has mapped.

It is for memory, not for devices: what lies in `gpunvme.P2pMemory` goes this way whenever ``path="auto"``, and through
host memory, saying why, where the kernel refuses. GPU memory goes this way only if asked to by name.
"""

from __future__ import annotations

from gpunvme import _native
from gpunvme.memory import Device
from gpunvme.p2pdma.mappings import Mapping
from gpunvme.paths.base import OpenMovement, Order, Source, Verdict


class P2pdmaPath:
    """Straight between a drive and another PCI device's memory; ``strict``: or not at all."""

    name = "p2pdma"

    def __init__(self, strict: bool = False) -> None:
        self._strict = strict

    def strictly(self) -> P2pdmaPath:
        """The same, for who asked for it by name."""
        return P2pdmaPath(strict=True)

    def installed(self, file: Source) -> Verdict:
        """Say whether the file can be read so at all, into whichever memory."""
        if not isinstance(file, _native.SourceFile):
            return Verdict(self.name, False, "a namespace that this process drives is no file of the kernel's")
        from gpunvme.cufile.facts import place_of
        from gpunvme.p2pdma import reasons

        refusal = reasons.why_no_file(file, place_of(file.fileno()))
        return Verdict(self.name, not refusal, refusal or "the file is on a drive, and read O_DIRECT")

    def verdict(self, file: Source, device: Device) -> Verdict:
        """Say whether memory of a device in general can be reached so."""
        installed = self.installed(file)
        if not installed.usable:
            return installed
        if not device.is_gpu:
            return Verdict(self.name, False, "it is for PCI memory (gpunvme.P2pMemory), and this is the host's")
        missing = _native.cuda_unavailable_reason()
        if missing:
            return Verdict(self.name, False, missing)
        from gpunvme.cufile import facts
        from gpunvme.p2pdma import gpu_mapping

        if facts.p2pdma() is False:
            return Verdict(self.name, False, "the kernel has no P2PDMA (CONFIG_PCI_P2PDMA)")
        refusal = gpu_mapping.why_not(device.index)
        return Verdict(self.name, not refusal, refusal or "the driver lets its GPU memory be mapped; not measured")

    def verdict_of(self, file: Source, mapping: Mapping) -> Verdict:
        """Say whether a file's drive reaches some PCI memory, by a small read."""
        if not isinstance(file, _native.SourceFile):
            return self.installed(file)
        from gpunvme.p2pdma import probe

        refusal = probe.why_not(file, mapping)
        return Verdict(self.name, not refusal, refusal or f"O_DIRECT straight into memory of {mapping.provider}")

    def speed(self, file: Source, device: Device, *, gather: bool = False) -> float | None:
        """Nothing is compared with it: PCI memory has no better way, GPU memory takes it by name only."""
        return None

    def begin(self, order: Order) -> OpenMovement:
        """Begin a transfer."""
        from gpunvme.p2pdma.movement import P2pdmaMovement

        return P2pdmaMovement(order, self._strict)
