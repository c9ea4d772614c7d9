"""Why gpunvme's kernel module is not there, in words that a person can act on, on machines that the test plays.

`modprobe: Key was rejected by service` sends people to a search engine; each case here must send them to its way out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from gpunvme.errors import TransportError
from gpunvme.nvme import module_state as modules
from gpunvme.nvme.bind import bind
from gpunvme.nvme.module_state import module_state, only_signed, why_not_loaded
from gpunvme.nvme.sysfs import Machine
from nvme_machine import BDF, Kernel, Tree, simple

if TYPE_CHECKING:
    from pathlib import Path

RELEASE, OTHER = "6.11.0-9-generic", "6.8.0-40-generic"
BUILT = f"/lib/modules/{RELEASE}/updates/dkms/gpunvme.ko.zst"
ON, OFF = b"\x06\0\0\0\x01", b"\x06\0\0\0\x00"
LOCKED, OPEN = "none [integrity] confidentiality", "[none] integrity confidentiality"
KEY = modules.KEYS[0]

Files = dict[str, "str | bytes | None"]
USUAL: Files = {"/proc/sys/kernel/osrelease": RELEASE, f"/lib/modules/{RELEASE}/build/Makefile": ""}


def machine(root: Path, files: Files) -> Machine:
    tree = Tree(root)
    for name, text in files.items():
        tree.file(name, text)
    return Machine(root)


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({}, ""),
        ({modules.SECURE_BOOT: ON}, "Secure Boot"),
        ({modules.SECURE_BOOT: OFF}, ""),
        ({modules.SECURE_BOOT: ON[:4]}, ""),
        ({modules.SECURE_BOOT: ON, modules.LOCKDOWN: LOCKED}, "Secure Boot"),
        ({modules.SECURE_BOOT: ON, modules.LOCKDOWN: OPEN}, ""),  # on, and this kernel does not care
        ({modules.LOCKDOWN: LOCKED}, "locked down (integrity)"),
        ({modules.LOCKDOWN: "none integrity [confidentiality]"}, "locked down (confidentiality)"),
        ({modules.LOCKDOWN: "garbage"}, ""),
        ({modules.SIGNATURES: "Y", modules.LOCKDOWN: OPEN}, "module.sig_enforce"),
        ({modules.SIGNATURES: "N"}, ""),
    ],
)
def test_who_demands_a_signature(tmp_path: Path, files: Files, words: str) -> None:
    said = only_signed(machine(tmp_path, files))
    assert words in said
    assert bool(said) == bool(words)


REJECTED = "modprobe gpunvme: modprobe: ERROR: could not insert 'gpunvme': Key was rejected by service"
FORBIDDEN = "modprobe gpunvme: modprobe: ERROR: could not insert 'gpunvme': Operation not permitted"
FORMAT = "modprobe gpunvme: modprobe: ERROR: could not insert 'gpunvme': Exec format error"
ABSENT = f"modprobe gpunvme: modprobe: FATAL: Module gpunvme not found in directory /lib/modules/{RELEASE}"

# What the machine is like, what modprobe said, and what a person must be told: each of the words, in this order.
CASES: dict[str, tuple[Files, str, tuple[str, ...]]] = {
    "Secure Boot, signed by DKMS": (
        {BUILT: "", modules.SECURE_BOOT: ON, KEY: ""},
        REJECTED,
        ("Secure Boot", f"mokutil --import {KEY}", "reboot", "or switch Secure Boot off"),
    ),
    "Secure Boot, Ubuntu's key": (
        {BUILT: "", modules.SECURE_BOOT: ON, modules.KEYS[1]: ""},
        REJECTED,
        (f"mokutil --import {modules.KEYS[1]}",),
    ),
    "Secure Boot, not signed": ({BUILT: "", modules.SECURE_BOOT: ON}, REJECTED, ("let DKMS build and sign it",)),
    "rejected, nothing says why": ({BUILT: "", KEY: ""}, REJECTED, ("signed by a key that it trusts", "mokutil")),
    "locked down": ({BUILT: "", modules.LOCKDOWN: LOCKED, KEY: ""}, FORBIDDEN, ("locked down", "mokutil")),
    "not asked, but locked": ({BUILT: "", modules.LOCKDOWN: LOCKED, KEY: ""}, "", ("locked down", "mokutil")),
    "signatures enforced": (
        {BUILT: "", modules.SIGNATURES: "Y", KEY: ""},
        REJECTED,
        ("module.sig_enforce", f"mokutil --import {KEY}", "or start the kernel without it"),
    ),
    "no right": ({BUILT: ""}, FORBIDDEN, ("takes root (CAP_SYS_MODULE)", "on the host")),
    "another kernel's file": (
        {BUILT: ""},
        FORMAT,
        (BUILT, f"built for another kernel than {RELEASE}", f"dkms install --force -k {RELEASE}"),
    ),
    "installed": ({BUILT: ""}, "", (BUILT, "sudo modprobe gpunvme")),
    "another kernel": (
        {f"/lib/modules/{OTHER}/updates/dkms/gpunvme.ko": ""},
        ABSENT,
        (f"built for {OTHER}, and this is {RELEASE}", f"sudo dkms autoinstall -k {RELEASE}"),
    ),
    "another kernel, no headers": (
        {f"/lib/modules/{OTHER}/extra/gpunvme.ko.xz": "", f"/lib/modules/{RELEASE}/build": None},
        ABSENT,
        (f"built for {OTHER}", f"linux-headers-{RELEASE}", f"sudo dkms autoinstall -k {RELEASE}"),
    ),
    "no headers": (
        {f"/lib/modules/{RELEASE}/build": None},
        ABSENT,
        (f"headers of {RELEASE} are missing", f"sudo apt install linux-headers-{RELEASE}", "make deb"),
    ),
    "old kernel": ({"/proc/sys/kernel/osrelease": "5.15.0-100-generic"}, ABSENT, ("5.15.0-100-generic", "boot 6.1")),
    "nothing at all": ({}, ABSENT, ("not installed", "make deb && sudo apt install", "kmod/README.md")),
}


def usual_with(change: Files) -> Files:
    files = {**USUAL, **change}
    for name in [name for name, text in change.items() if text is None]:
        files = {each: text for each, text in files.items() if not each.startswith(name)}
    return files


@pytest.mark.parametrize("name", CASES)
def test_each_reason_says_the_way_out(tmp_path: Path, name: str) -> None:
    change, said, words = CASES[name]
    told = why_not_loaded(module_state(machine(tmp_path, usual_with(change))), said)
    places = [told.find(word) for word in words]
    assert -1 not in places, told
    assert places == sorted(places), told


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case[1]])
def test_bind_says_it_and_leaves_the_drive(tmp_path: Path, name: str) -> None:
    """Who asks for the module and cannot have it keeps a drive that works."""
    change, said, words = CASES[name]
    tree = simple(tmp_path)
    for path, text in usual_with(change).items():
        tree.file(path, text)

    class Refusing(Kernel):
        def load_module(self, module: str) -> str:
            assert module == "gpunvme"
            return said

    kernel = Refusing(tmp_path)
    with pytest.raises(TransportError, match="there is no driver gpunvme: modprobe") as caught:
        bind(BDF, "gpunvme", machine=kernel)
    assert words[0] in str(caught.value)
    assert kernel.writes == []
    assert kernel.link(f"/sys/bus/pci/devices/{BDF}/driver") == "nvme"


@pytest.mark.parametrize("loaded_already", [True, False])
def test_a_module_of_another_version_gets_no_drive(tmp_path: Path, loaded_already: bool) -> None:
    """Opening would be refused, and the drive would be gone from the kernel for nothing."""
    tree = simple(tmp_path)

    def load() -> None:
        tree.file("/sys/module/gpunvme/version", "7")
        tree.folder("/sys/bus/pci/drivers/gpunvme")

    class Loading(Kernel):
        def load_module(self, module: str) -> str:
            load()
            return ""

    if loaded_already:
        load()
    kernel = Loading(tmp_path)
    with pytest.raises(TransportError, match=r"version 7, this package knows 1: .*make deb .*sudo rmmod gpunvme"):
        bind(BDF, "gpunvme", machine=kernel)
    assert kernel.writes == []


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ("modprobe vfio_pci: modprobe: FATAL: Module vfio-pci not found", f"linux-modules-extra-{RELEASE}"),
        ("modprobe vfio_pci: Operation not permitted", "takes root"),
        ("modprobe no_such: modprobe: FATAL: Module no_such not found", "drivers for user space are vfio-pci"),
    ],
)
def test_a_kernel_without_the_driver_says_what_to_do(tmp_path: Path, said: str, words: str) -> None:
    simple(tmp_path).file("/proc/sys/kernel/osrelease", RELEASE)
    driver = "no-such" if "no_such" in said else "vfio-pci"

    class Refusing(Kernel):
        def load_module(self, module: str) -> str:
            return said

    with pytest.raises(TransportError, match=f"there is no driver {driver}") as caught:
        bind(BDF, driver, timeout=0.1, machine=Refusing(tmp_path))
    assert words in str(caught.value)


def test_what_is_loaded_is_told(tmp_path: Path) -> None:
    files: Files = {**USUAL, "/sys/module/gpunvme/version": "1"}
    state = module_state(machine(tmp_path, files))
    assert (state.loaded, state.fits, state.headers, state.others) == (True, True, True, ())


@pytest.mark.parametrize(
    ("release", "old"),
    [("6.1.0-50-amd64", False), ("6.0.19", True), ("7.0.1", False), ("5.15.0", True), ("odd", False)],
)
def test_which_kernels_are_too_old(tmp_path: Path, release: str, old: bool) -> None:
    assert module_state(machine(tmp_path, {"/proc/sys/kernel/osrelease": release})).too_old is old


def test_other_kernels_are_others(tmp_path: Path) -> None:
    """Otherwise a person with the module for this very kernel is sent to another one."""
    other = f"/lib/modules/{OTHER}/updates/dkms/gpunvme.ko"
    state = module_state(machine(tmp_path, {**USUAL, BUILT: "", other: ""}))
    assert (state.installed, state.others) == (BUILT, (OTHER,))
