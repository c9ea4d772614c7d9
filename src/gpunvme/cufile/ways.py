"""Which of cuFile's ways are possible for a file, by what the machine says, and the driver if it is open."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gpunvme.cufile import facts

if TYPE_CHECKING:
    from gpunvme import _native
    from gpunvme.cufile.driver import Driver
    from gpunvme.cufile.facts import Place

# The version that was seen to register no file whose file system udev does not know.
_NEEDS_UDEV = 1150


def why_no_nvidia_fs(file: _native.SourceFile, place: Place, opened: Driver | None) -> str:
    """Why nvidia-fs cannot carry a file's bytes; "" where nothing speaks against it."""
    module = facts.nvidia_fs()
    promised = opened is not None and opened.properties.nvidia_fs != (0, 0)
    if module is None:
        if promised:
            return "contradictory: libcufile says that it found nvidia-fs, and /proc/driver/nvidia-fs is not there"
        return "the nvidia-fs kernel module is not loaded"
    if facts.settings().force_compat:
        return f"compatibility mode is forced ({facts.settings().place or 'CUFILE_FORCE_COMPAT_MODE'})"
    if file.direct_refusal:
        return f"it needs O_DIRECT: {file.direct_refusal}"
    if place.in_memory:
        return f"there is no drive beneath {place}"
    if opened is not None:
        if not promised:
            return f"contradictory: nvidia-fs {module} is loaded, and libcufile's driver properties do not have it"
        bit = place.status_bit
        if bit is not None and not opened.properties.supports(bit):
            return f"libcufile's driver properties do not have {place}"
    return ""


def why_no_p2pdma(file: _native.SourceFile, place: Place, opened: Driver | None) -> str:
    """Why the kernel's P2PDMA cannot; "" where nothing speaks against it."""
    asked = facts.settings()
    if asked.force_compat:
        return f"compatibility mode is forced ({asked.place or 'CUFILE_FORCE_COMPAT_MODE'})"
    if asked.use_p2pdma is False:
        return "it is switched off (use_pci_p2pdma)"
    if file.direct_refusal:
        return f"it needs O_DIRECT: {file.direct_refusal}"
    if place.transports != {"pcie"}:
        return f"it needs NVMe drives on PCI Express: the file is on {place}"
    if facts.p2pdma() is False:
        return "the kernel has no P2PDMA (CONFIG_PCI_P2PDMA)"
    if opened is not None and not opened.properties.p2pdma:
        return "libcufile's driver properties do not have it"
    if opened is None and facts.p2pdma() is None:
        return "nothing says that the kernel has it"
    if opened is None and facts.static_bar1() is False and not asked.use_p2pdma:
        return "NVIDIA's driver was not loaded for it (RMForceStaticBar1=1)"
    return ""


def why_no_compat(place: Place, opened: Driver | None) -> str:
    """Why compatibility mode cannot, where it is the only one left; "" where nothing speaks against it."""
    if facts.settings().allow_compat is False or (opened is not None and not opened.properties.allows_compat):
        return "cufile.json does not allow it (allow_compat_mode)"
    if opened is not None and opened.version // 10 == _NEEDS_UDEV // 10:
        missing = facts.missing_from_udev(place)
        return f"{opened} would not take the file: {missing}" if missing else ""
    return ""
