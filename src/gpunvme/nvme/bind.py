"""Taking a controller from the kernel's driver, and giving it back.

`bind` hands a PCI function to vfio-pci, `unbind` returns it to the kernel. Both write to sysfs
(``Documentation/ABI/testing/sysfs-bus-pci``): ``driver_override`` first, so that no other driver can have the function
in between, then ``driver/unbind``, then ``drivers_probe``. Whatever fails on the way is undone.
"""

from __future__ import annotations

import errno
import os
import stat
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from gpunvme.errors import TransportError, UnsafeDeviceError
from gpunvme.nvme.module_state import module_state, why_not_loaded, wrong_version
from gpunvme.nvme.safety import Claim
from gpunvme.nvme.sysfs import (
    Function,
    Machine,
    controller_name,
    folder_of,
    group_members,
    namespace_names,
    nvme_function,
)

KERNEL_DRIVER = "nvme"
OWN_DRIVER = "gpunvme"
_STEP = 0.02  # seconds between two looks
_NOIOMMU_SWITCH = "/sys/module/vfio/parameters/enable_unsafe_noiommu_mode"


@dataclass(frozen=True)
class Change:
    """What `bind` or `unbind` did: the driver before and after, and the block devices that went or came."""

    address: str
    before: str | None
    after: str | None
    namespaces: tuple[str, ...]

    @property
    def changed(self) -> bool:
        """Whether there was anything to do."""
        return self.before != self.after


def bind(
    bdf: str,
    driver: str = "vfio-pci",
    *,
    overwrite: str | None = None,
    noiommu: bool = False,
    timeout: float = 10.0,
    machine: Machine | None = None,
) -> Change:
    """Take a controller from the kernel's driver and hand it to a driver for user space.

    Parameters
    ----------
    bdf
        PCI address of the controller.
    driver
        Who gets it: ``vfio-pci`` or a variant of it, or ``gpunvme``, this project's own kernel module.
    overwrite
        The same PCI address once more, in full, to take a controller although it holds data or a process has it open;
        see `gpunvme.nvme.safety`.
    noiommu
        Allow it without an IOMMU: from then on the controller, and whoever drives it, can write to all of the
        machine's memory. Switches VFIO's unsafe mode on.
    timeout
        Seconds that each step may take.
    machine
        Where sysfs is.

    Raises
    ------
    UriError
        If it is no PCI address.
    UnsafeDeviceError
        If it is in use, or holds data; says which, where, and how to go on.
    TransportError
        If it is no NVMe controller, there is no IOMMU, a module is missing, or the kernel refuses. The controller is
        back with the driver that it had.
    """
    machine = machine or Machine()
    function = nvme_function(bdf, machine)
    address = function.address
    if function.driver == driver:
        return Change(address, driver, driver, ())
    _check_iommu(function, noiommu)
    give_up = time.monotonic() + timeout
    while True:
        with Claim(address, machine) as claim:
            # Before anything is touched, modules included; and held until the kernel's driver is gone.
            claim.check(overwrite)
            _need_driver(driver, timeout, machine)
            if noiommu and function.iommu_group is None and driver != OWN_DRIVER:
                _allow_noiommu(machine)
            # The kernel finds namespaces one by one: what was not there yet was not looked at.
            if tuple(namespace_names(address, machine)) == claim.namespaces:
                _take(function, driver, timeout, machine)
                return Change(address, function.driver, driver, claim.namespaces)
        if time.monotonic() >= give_up:
            raise TransportError(f"{address}: namespaces come and go while they are looked at; see dmesg")
        time.sleep(_STEP)


def unbind(bdf: str, *, timeout: float = 10.0, machine: Machine | None = None) -> Change:
    """Give a controller back to the kernel's own driver, whatever has it now.

    Parameters
    ----------
    bdf
        PCI address of the controller.
    timeout
        Seconds that each step may take.
    machine
        Where sysfs is.

    Raises
    ------
    UriError
        If it is no PCI address.
    UnsafeDeviceError
        If a process still drives it.
    TransportError
        If it is no NVMe controller, or the kernel's driver does not take it.
    """
    machine = machine or Machine()
    function = nvme_function(bdf, machine)
    address = function.address
    if function.driver != KERNEL_DRIVER:
        _check_unused(function, machine)
        _need_driver(KERNEL_DRIVER, timeout, machine)
        _hand_over(function, None, timeout, machine)
    elif machine.read(f"{folder_of(address)}/driver_override") not in {None, "", "(null)"}:
        # Whoever was interrupted between two steps has left it; the next probe would go elsewhere.
        _write(f"{folder_of(address)}/driver_override", "\n", timeout, machine)
    _wait(
        lambda: machine.read(f"{folder_of(address)}/nvme/{controller_name(address, machine)}/state") == "live",
        timeout,
        f"{address} is with {KERNEL_DRIVER} again, but does not get ready; see dmesg",
    )
    return Change(address, function.driver, KERNEL_DRIVER, tuple(namespace_names(address, machine)))


# --- before


def _check_iommu(function: Function, noiommu: bool) -> None:
    if function.iommu_group is None and not noiommu:
        raise TransportError(
            f"{function.address} is in no IOMMU group: this machine's IOMMU is off. Switch it on in the firmware "
            f"(VT-d, AMD-Vi) and start the kernel with intel_iommu=on (AMD's is on by itself). Without one, a "
            f"controller that is driven from user space can write to all memory; to accept that: noiommu=True"
        )


def _need_driver(driver: str, timeout: float, machine: Machine) -> None:
    """Load a driver's module if the driver is not there."""
    where = f"/sys/bus/pci/drivers/{driver}"
    if driver.startswith("vfio"):
        # The container's part of VFIO; where it is missing, opening the device will say so.
        machine.load_module("vfio_iommu_type1")
    if machine.exists(where):
        _check_version(driver, machine)
        return
    why = machine.load_module(driver.replace("-", "_"))
    if not _waited(lambda: machine.exists(where), 0 if why else timeout):
        raise TransportError(f"there is no driver {driver}: {why or 'see dmesg'}; {_way_out(driver, why, machine)}")
    _check_version(driver, machine)


def _check_version(driver: str, machine: Machine) -> None:
    """Refuse our own module in another version before a drive is with it: opening would be refused then."""
    if driver == OWN_DRIVER:
        state = module_state(machine)
        if state.version is not None and not state.fits:
            raise TransportError(wrong_version(state.version))


def _way_out(driver: str, said: str, machine: Machine) -> str:
    """Say what to do where a driver's module cannot be loaded."""
    if driver == OWN_DRIVER:
        return why_not_loaded(module_state(machine), said)
    if "not permitted" in said:
        return "loading a module takes root (CAP_SYS_MODULE); in a container, run this on the host"
    if not driver.startswith("vfio"):
        return f"drivers for user space are vfio-pci, its variants, and {OWN_DRIVER}"
    release = machine.read("/proc/sys/kernel/osrelease") or "unknown"
    return (
        f"this kernel ({release}) may be without it: boot one with CONFIG_VFIO_PCI (Ubuntu: sudo apt install "
        f"linux-modules-extra-{release}); in a container, run this on the host"
    )


def _allow_noiommu(machine: Machine) -> None:
    try:
        machine.write(_NOIOMMU_SWITCH, "1")
    except FileNotFoundError as error:
        raise TransportError("this kernel has no no-IOMMU mode (CONFIG_VFIO_NOIOMMU)") from error
    except OSError as error:
        raise TransportError(f"{_NOIOMMU_SWITCH}: {error.strerror}") from error


def _check_unused(function: Function, machine: Machine) -> None:
    """Refuse to take a function from whoever drives it: the kernel would wait until that process ends."""
    nodes = user_nodes(function.address, machine)
    for node in nodes:
        try:
            # A group, and a function of our module, can be opened by one at a time.
            os.close(os.open(machine.path(node), os.O_RDWR | os.O_CLOEXEC))
        except OSError as error:
            if error.errno == errno.EBUSY:
                raise UnsafeDeviceError(f"{function.address} is being driven: {_users(nodes, machine)}") from error
    users = _users(nodes, machine) if nodes else ""
    if users:
        raise UnsafeDeviceError(f"{function.address} is being driven: {users}")


def _users(nodes: list[str], machine: Machine) -> str:
    """Say which processes have a device file open, and what to do."""
    found = find_users(nodes, machine)
    return f"end {', '.join(found)} first" if found else ""


def find_users(nodes: list[str], machine: Machine) -> list[str]:
    """Return the processes that have one of these device files open, as "process 12 (name)"."""
    numbers = set()
    for node in nodes:
        try:
            status = os.stat(machine.path(node))
        except OSError:
            continue
        if stat.S_ISCHR(status.st_mode):
            numbers.add(status.st_rdev)
    found = []
    for process in filter(str.isdigit, machine.names("/proc")):
        for entry in machine.names(f"/proc/{process}/fd"):
            try:
                status = os.stat(machine.path(f"/proc/{process}/fd/{entry}"))
            except OSError:
                continue
            if stat.S_ISCHR(status.st_mode) and status.st_rdev in numbers:
                found.append(f"process {process} ({machine.read(f'/proc/{process}/comm') or 'unknown'})")
                break
    return found


def user_nodes(address: str, machine: Machine) -> list[str]:
    """Return the device files by which a function that is bound to a driver for user space can be opened.

    ``/dev/vfio/GROUP`` (``noiommu-GROUP`` without an IOMMU), and ``/dev/vfio/devices/vfioN`` where the kernel has it;
    ``/dev/gpunvmeN`` of our own module.
    """
    where = folder_of(address)
    own = [f"/dev/{name}" for name in machine.names(f"{where}/gpunvme")]
    if own:
        return [node for node in own if machine.exists(node)]
    group = machine.link(f"{where}/iommu_group")
    nodes = []
    if group is not None:
        # Without an IOMMU, vfio-pci makes a group of its own and says so in its name.
        names = [f"/dev/vfio/{group}", f"/dev/vfio/noiommu-{group}"]
        nodes = [name for name in names if machine.exists(name)]
    nodes += [f"/dev/vfio/devices/{name}" for name in machine.names(f"{where}/vfio-dev")]
    return [node for node in nodes if machine.exists(node)]


# --- the change itself


def _take(function: Function, driver: str, timeout: float, machine: Machine) -> None:
    """Move a function to a driver for user space, or leave it where it was."""
    try:
        _hand_over(function, driver, timeout, machine)
        _wait_for_nodes(function.address, timeout, machine)
    except BaseException as error:
        _roll_back(function, timeout, machine, error)
        raise


def _hand_over(function: Function, driver: str | None, timeout: float, machine: Machine) -> None:
    """Move a function to a driver, or to the one that the kernel chooses (None)."""
    address = function.address
    where = folder_of(address)
    # First of all: from here on no other driver takes it, whoever else probes.
    _write(f"{where}/driver_override", driver or "\n", timeout, machine)
    if machine.link(f"{where}/driver") is not None:
        _write(f"{where}/driver/unbind", address, timeout, machine)
    _wait(lambda: machine.link(f"{where}/driver") is None, timeout, f"{address}: its driver does not let go of it")
    _write("/sys/bus/pci/drivers_probe", address, timeout, machine)
    wanted = driver or KERNEL_DRIVER

    def arrived() -> bool:
        return machine.link(f"{where}/driver") == wanted

    if not _waited(arrived, timeout):
        now = machine.link(f"{where}/driver") or "no driver"
        others = ""
        if function.iommu_group is not None and driver is not None:
            members = [each for each in group_members(function.iommu_group, machine) if each.address != address]
            others = "".join(f", {each.address} ({each.kind}) has {each.driver or 'none'}" for each in members)
            others = f" In its IOMMU group {function.iommu_group}{others}." if others else ""
        raise TransportError(f"{address}: {wanted} did not take it, it has {now}.{others} dmesg says more")


def _roll_back(function: Function, timeout: float, machine: Machine, error: BaseException) -> None:
    """Return a function to the driver that it had; add to the error what that led to."""
    where = folder_of(function.address)
    try:
        _write(f"{where}/driver_override", "\n", timeout, machine)
        now = machine.link(f"{where}/driver")
        if now is not None and now != function.driver:
            _write(f"{where}/driver/unbind", function.address, timeout, machine)
            now = None
        if now is None and function.driver is not None:
            _write("/sys/bus/pci/drivers_probe", function.address, timeout, machine)
            _waited(lambda: machine.link(f"{where}/driver") == function.driver, timeout)
    except TransportError as second:
        error.add_note(f"undoing it failed too: {second}")
    now = machine.link(f"{where}/driver")
    error.add_note(
        f"{function.address} has {now or 'no driver'}"
        + (" again" if now == function.driver else f"; it had {function.driver}")
    )


def _write(name: str, text: str, timeout: float, machine: Machine) -> None:
    """Write to sysfs. The kernel works while it is written: a driver that hangs would keep us for ever."""
    failure: list[BaseException] = []

    def write() -> None:
        try:
            machine.write(name, text)
        except BaseException as error:  # noqa: BLE001 - handed to the thread that waits
            failure.append(error)

    thread = threading.Thread(target=write, name="gpunvme-sysfs", daemon=True)
    thread.start()
    try:
        thread.join(timeout)
    except BaseException:
        # The kernel goes on with it: whatever undoes it has to come after it.
        thread.join(timeout)
        raise
    said = f"writing {text.strip()!r} to {name}"
    if thread.is_alive():
        raise TransportError(f"{said} takes more than {timeout:g} s: a driver hangs, or waits for a process. See dmesg")
    if not failure:
        return
    error = failure[0]
    if isinstance(error, PermissionError):
        raise TransportError(f"{said}: permission denied; run this as root") from error
    if isinstance(error, FileNotFoundError) and name.endswith("/driver/unbind"):
        return  # it has let go meanwhile
    if isinstance(error, OSError) and error.errno == errno.EROFS:
        raise TransportError(f"{said}: sysfs is read-only here, as in most containers; run this outside") from error
    if isinstance(error, OSError) and error.errno == errno.EINVAL and name.endswith("/drivers_probe"):
        return  # the driver refused; whoever waits for it will see, and knows more
    raise TransportError(f"{said}: {error}") from error


def _wait_for_nodes(address: str, timeout: float, machine: Machine) -> None:
    """Wait until devtmpfs or udev has made the device files."""
    _wait(lambda: bool(user_nodes(address, machine)), timeout, f"{address}: no device file for it appeared in /dev")


def _waited(condition: Callable[[], bool], timeout: float) -> bool:
    give_up = time.monotonic() + timeout
    while not condition():
        if time.monotonic() >= give_up:
            return False
        time.sleep(_STEP)
    return True


def _wait(condition: Callable[[], bool], timeout: float, message: str) -> None:
    if not _waited(condition, timeout):
        raise TransportError(message)
