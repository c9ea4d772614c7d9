"""gpunvme's kernel module on a machine: loaded, installed, built for another kernel, or kept out, and what to do then.

Read from /sys, /proc and /lib/modules; nothing is run. The doctor and `bind` say what is found here.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gpunvme.nvme.kmod_uapi import VERSION

if TYPE_CHECKING:
    from gpunvme.nvme.sysfs import Machine

NAME = "gpunvme"
OLDEST_KERNEL = (6, 1)

# UEFI Specification 2.10, section 3.3: a variable of the firmware's own; one byte, 1 where it is on. Linux puts four
# bytes of attributes before it (Documentation/filesystems/efivarfs.rst).
SECURE_BOOT = "/sys/firmware/efi/efivars/SecureBoot-8be4df61-93ca-11d2-aa0d-00e098032b8c"
LOCKDOWN = "/sys/kernel/security/lockdown"  # kernel_lockdown(7): "none [integrity] confidentiality"
SIGNATURES = "/sys/module/module/parameters/sig_enforce"  # Documentation/admin-guide/module-signing.rst
_LOADED = f"/sys/module/{NAME}"
# Where DKMS keeps the key by which it signs: its own place, and Ubuntu's.
KEYS = ("/var/lib/dkms/mok.pub", "/var/lib/shim-signed/mok/MOK.der")
_PLACES = ("updates/dkms", "updates", "extra", "kernel/drivers/misc")
_SUFFIXES = ("", ".xz", ".zst", ".gz")


@dataclass(frozen=True)
class ModuleState:
    """What is known of the module on a machine.

    Attributes
    ----------
    release
        The running kernel's, as ``uname -r`` prints it.
    loaded
        Whether the module is loaded.
    version
        Of the loaded module's interface; None if it is not loaded, or does not say.
    installed
        The file for the running kernel, or nothing.
    others
        Other kernels that it is installed for.
    headers
        Whether the headers of the running kernel are there, to build it.
    only_signed
        Why the kernel takes only signed modules; empty if it does not, or nothing says so.
    key
        The public key that DKMS signs with here; empty if there is none yet.
    """

    release: str
    loaded: bool
    version: str | None
    installed: str
    others: tuple[str, ...]
    headers: bool
    only_signed: str
    key: str

    @property
    def fits(self) -> bool:
        """Whether the loaded module has the interface that this package knows."""
        return self.version == str(VERSION)

    @property
    def too_old(self) -> bool:
        """Whether the running kernel is older than the module can be built for."""
        match = re.match(r"(\d+)\.(\d+)", self.release)
        return match is not None and (int(match[1]), int(match[2])) < OLDEST_KERNEL


def module_state(machine: Machine) -> ModuleState:
    """Look at the module on a machine."""
    release = machine.read("/proc/sys/kernel/osrelease") or "unknown"
    releases = machine.names("/lib/modules")
    return ModuleState(
        release=release,
        loaded=machine.exists(_LOADED),
        version=machine.read(f"{_LOADED}/version"),
        installed=_installed(release, machine),
        others=tuple(each for each in releases if each != release and _installed(each, machine)),
        headers=machine.exists(f"/lib/modules/{release}/build"),
        only_signed=only_signed(machine),
        key=next((key for key in KEYS if machine.exists(key)), ""),
    )


def _installed(release: str, machine: Machine) -> str:
    names = (f"/lib/modules/{release}/{place}/{NAME}.ko{suffix}" for place in _PLACES for suffix in _SUFFIXES)
    return next((name for name in names if machine.exists(name)), "")


def only_signed(machine: Machine) -> str:
    """Return why the running kernel takes only modules that are signed by a key that it trusts, or nothing.

    Lockdown decides, where the kernel tells of it: Secure Boot may be on, and the kernel not care.
    """
    if machine.read(SIGNATURES) == "Y":
        return "the kernel takes only signed modules (module.sig_enforce)"
    locked = re.search(r"\[(\w+)\]", machine.read(LOCKDOWN) or "")
    if locked is not None and locked[1] == "none":
        return ""
    if secure_boot(machine):
        return "Secure Boot takes only signed modules"
    if locked is not None:
        return f"the kernel is locked down ({locked[1]}) and takes only signed modules"
    return ""


def secure_boot(machine: Machine) -> bool:
    """Tell whether the firmware says that Secure Boot is on."""
    data = machine.read_bytes(SECURE_BOOT)
    return data is not None and len(data) >= 5 and data[4] == 1


def why_not_loaded(state: ModuleState, said: str = "") -> str:
    """Say why the module is not there, and the way out.

    Parameters
    ----------
    state
        The machine's.
    said
        What modprobe(8) answered; empty if it was not asked.
    """
    refused = re.search(r"[Kk]ey was rejected|[Rr]equired key", said) is not None
    if refused or (state.only_signed and ("not permitted" in said or (state.installed and not said))):
        why = state.only_signed or "the kernel takes only modules that are signed by a key that it trusts"
        if state.key:
            way = f"sudo mokutil --import {state.key}, reboot, and enrol the key in the blue screen before the kernel"
        else:
            way = f"let DKMS build and sign it ({_BY_DKMS}), then enrol its key by mokutil --import"
        off = "start the kernel without it" if "sig_enforce" in why else "switch Secure Boot off in the firmware"
        return f"{why}: {way}; or {off}"
    if "not permitted" in said:
        return "loading it takes root (CAP_SYS_MODULE); in a container, load it on the host: sudo modprobe gpunvme"
    if re.search(r"Exec format error|Invalid module format|disagrees about version|Unknown symbol", said):
        return (
            f"{state.installed or 'it'} was built for another kernel than {state.release}: build it anew "
            f"(sudo dkms install --force -k {state.release} gpunvme/VERSION; `dkms status` names the version)"
        )
    if state.installed:
        return f"{state.installed} is there, not loaded: sudo modprobe gpunvme, and if that fails see dmesg"
    if state.too_old:
        return f"Linux {state.release} is too old for it: boot {_dotted(OLDEST_KERNEL)} or later"
    built = f"it is built for {', '.join(state.others)}, and this is {state.release}: " if state.others else ""
    if not state.headers:
        return (
            f"{built}the headers of {state.release} are missing: sudo apt install linux-headers-{state.release}, then "
            + (f"sudo dkms autoinstall -k {state.release}" if state.others else _BY_DKMS)
        )
    if state.others:
        return f"{built}sudo dkms autoinstall -k {state.release}, or boot one of those"
    return f"it is not installed: {_BY_DKMS}, or make -C kmod && sudo insmod kmod/gpunvme.ko (kmod/README.md)"


def wrong_version(version: object) -> str:
    """Say that the loaded module is not the one that this package knows, and the way out."""
    return (
        f"the loaded module's interface has version {version}, this package knows {VERSION}: install "
        f"the module that came with it ({_BY_DKMS}), then sudo rmmod gpunvme && sudo modprobe gpunvme"
    )


_BY_DKMS = "make deb && sudo apt install ./dist/gpunvme-dkms_*.deb"


def _dotted(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))
