"""Taking a controller from the kernel and giving it back, on a kernel that the test plays.

If these fail, a drive ends up with no driver, or with the wrong one, or is taken from under somebody's feet.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from typing import TYPE_CHECKING

import pytest

from gpunvme.cli import nvme_devices
from gpunvme.errors import TransportError, UnsafeDeviceError
from gpunvme.nvme import bind as binding
from gpunvme.nvme import sysfs
from gpunvme.nvme.bind import bind, unbind
from nvme_machine import BDF, MIB, Kernel, Tree, simple

if TYPE_CHECKING:
    from pathlib import Path

WHERE = f"/sys/bus/pci/devices/{BDF}"


def driver_of(root: Path) -> str | None:
    return Kernel(root).link(f"{WHERE}/driver")


def override_of(root: Path) -> str | None:
    return Kernel(root).read(f"{WHERE}/driver_override")


def test_bind_writes_in_the_order_that_leaves_no_gap(tmp_path: Path) -> None:
    simple(tmp_path)
    kernel = Kernel(tmp_path)
    change = bind("01:00.0", machine=kernel)
    assert (change.address, change.before, change.after, change.namespaces) == (BDF, "nvme", "vfio-pci", ("nvme0n1",))
    assert change.changed
    assert kernel.writes == [
        (f"{WHERE}/driver_override", "vfio-pci"),
        (f"{WHERE}/driver/unbind", BDF),
        ("/sys/bus/pci/drivers_probe", BDF),
    ]
    assert kernel.loaded == ["vfio_iommu_type1", "vfio_pci"]
    assert binding.user_nodes(BDF, kernel) == ["/dev/vfio/12"]


def test_the_namespaces_are_held_while_the_driver_goes(tmp_path: Path) -> None:
    # Somebody who mounts between looking and taking would lose what he writes.
    tree = simple(tmp_path)
    disk = str(tree.path("/dev/nvme0n1"))
    held = []

    def before(name: str, _text: str) -> None:
        for entry in os.listdir("/proc/self/fd"):
            try:
                if os.readlink(f"/proc/self/fd/{entry}") == disk:
                    held.append(name)
            except OSError:
                pass

    bind(BDF, machine=Kernel(tmp_path, before=before))
    assert f"{WHERE}/driver/unbind" in held


def test_bind_and_unbind_return_to_where_they_began(tmp_path: Path) -> None:
    simple(tmp_path)
    kernel = Kernel(tmp_path)
    bind(BDF, machine=kernel)
    change = unbind(BDF, machine=kernel)
    assert (change.before, change.after, change.namespaces) == ("vfio-pci", "nvme", ("nvme0n1",))
    assert driver_of(tmp_path) == "nvme"
    assert override_of(tmp_path) == "(null)"


def test_what_is_so_already_is_left_so(tmp_path: Path) -> None:
    tree = Tree(tmp_path)
    tree.pci(driver="vfio-pci")
    kernel = Kernel(tmp_path)
    assert not bind(BDF, machine=kernel).changed
    assert kernel.writes == []
    simple(tmp_path / "other")
    kernel = Kernel(tmp_path / "other")
    assert not unbind(BDF, machine=kernel).changed
    assert kernel.writes == []


def test_a_drive_in_use_is_not_touched(tmp_path: Path) -> None:
    simple(tmp_path).mounts("40 1 259:0 / /home rw - ext4 /dev/nvme0n1 rw")
    kernel = Kernel(tmp_path)
    with pytest.raises(UnsafeDeviceError, match="mounted at /home"):
        bind(BDF, overwrite=BDF, machine=kernel)
    assert (kernel.writes, kernel.loaded) == ([], [])


def test_namespaces_that_appear_late_are_looked_at_too(tmp_path: Path) -> None:
    # The kernel finds them one by one. The second one is mounted as soon as it is there.
    tree = simple(tmp_path)

    class Late(Kernel):
        def load_module(self, module: str) -> str:
            tree.controller(entries=("nvme0n1", "nvme0n2"))
            tree.block("nvme0n2", "259:9", nsid=2)
            tree.mounts("40 1 259:9 / /mnt rw - ext4 /dev/nvme0n2 rw")
            return super().load_module(module)

    kernel = Late(tmp_path)
    with pytest.raises(UnsafeDeviceError, match="nvme0n2 is mounted at /mnt"):
        bind(BDF, machine=kernel)
    assert kernel.writes == []


def test_a_drive_with_data_needs_its_name(tmp_path: Path) -> None:
    data = bytearray(MIB)
    data[:4] = b"XFSB"
    simple(tmp_path, bytes(data))
    kernel = Kernel(tmp_path)
    with pytest.raises(UnsafeDeviceError, match="XFS"):
        bind(BDF, machine=kernel)
    assert kernel.writes == []
    assert bind(BDF, overwrite=BDF, machine=kernel).after == "vfio-pci"


def test_what_is_no_controller_is_not_touched(tmp_path: Path) -> None:
    tree = simple(tmp_path)
    tree.pci("0000:02:00.0", code="0x030000", driver="nvidia", group=13)
    kernel = Kernel(tmp_path)
    for change in (bind, unbind):
        with pytest.raises(TransportError, match="no NVMe controller but VGA"):
            change("0000:02:00.0", machine=kernel)
    assert kernel.writes == []


def test_without_an_iommu_it_must_be_asked_for(tmp_path: Path) -> None:
    tree = Tree(tmp_path)
    tree.pci(group=None)
    tree.controller(entries=())
    kernel = Kernel(tmp_path)
    with pytest.raises(TransportError, match="intel_iommu=on"):
        bind(BDF, machine=kernel)
    assert (kernel.writes, kernel.loaded) == ([], [])
    with pytest.raises(TransportError, match="CONFIG_VFIO_NOIOMMU"):
        bind(BDF, noiommu=True, machine=kernel)
    assert driver_of(tmp_path) == "nvme"


@pytest.fixture
def one_look(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever waits looks once: this kernel has done what was written when the write returns."""
    monkeypatch.setattr(binding, "_waited", lambda condition, _timeout: condition())


@pytest.mark.usefixtures("one_look")
def test_a_driver_that_refuses_is_undone(tmp_path: Path) -> None:
    tree = simple(tmp_path)
    tree.pci("0000:01:00.1", code="0x010601", driver="ahci", group=12)
    kernel = Kernel(tmp_path, refuse=frozenset({"vfio-pci"}))
    with pytest.raises(TransportError, match=r"vfio-pci did not take it.*0000:01:00.1 \(SATA\) has ahci") as caught:
        bind(BDF, machine=kernel)
    assert driver_of(tmp_path) == "nvme"
    assert override_of(tmp_path) == "(null)"
    assert caught.value.__notes__ == [f"{BDF} has nvme again"]


def test_missing_driver_is_found_before_anything_is_touched(tmp_path: Path) -> None:
    class NoModules(Kernel):
        def load_module(self, module: str) -> str:
            return f"modprobe {module}: not found"

    simple(tmp_path)
    kernel = NoModules(tmp_path)
    with pytest.raises(TransportError, match="there is no driver vfio-pci: modprobe vfio_pci: not found"):
        bind(BDF, machine=kernel)
    assert kernel.writes == []


def test_interrupted_bind_is_undone(tmp_path: Path) -> None:
    simple(tmp_path)
    interrupted = threading.Event()

    def before(name: str, _text: str) -> None:
        if name.endswith("drivers_probe") and not interrupted.is_set():
            interrupted.set()
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.1)  # the kernel is still at it when Ctrl-C arrives

    with pytest.raises(KeyboardInterrupt):
        bind(BDF, machine=Kernel(tmp_path, before=before))
    assert interrupted.is_set()
    assert driver_of(tmp_path) == "nvme"
    assert override_of(tmp_path) == "(null)"


def test_driver_that_hangs_has_a_deadline(tmp_path: Path) -> None:
    simple(tmp_path)
    released = threading.Event()

    def before(name: str, _text: str) -> None:
        if name.endswith("/unbind"):
            released.wait(20)

    try:
        with pytest.raises(TransportError, match=r"takes more than 0\.2 s"):
            bind(BDF, timeout=0.2, machine=Kernel(tmp_path, before=before))
    finally:
        released.set()


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (PermissionError(13, "Permission denied"), "as root"),
        (OSError(30, "Read-only file system"), "containers"),
        (OSError(16, "Device or resource busy"), "busy"),
    ],
)
def test_refused_writes_say_what_to_do(tmp_path: Path, error: OSError, words: str) -> None:
    simple(tmp_path)

    def before(_name: str, _text: str) -> None:
        raise error

    with pytest.raises(TransportError, match=words):
        bind(BDF, machine=Kernel(tmp_path, before=before))
    assert driver_of(tmp_path) == "nvme"


def test_a_driver_that_let_go_by_itself_is_no_error(tmp_path: Path) -> None:
    simple(tmp_path)

    def before(name: str, _text: str) -> None:
        if name.endswith("/unbind"):
            (tmp_path / WHERE[1:] / "driver").unlink()

    assert bind(BDF, machine=Kernel(tmp_path, before=before)).after == "vfio-pci"


def test_unbind_clears_what_an_interrupted_bind_has_left(tmp_path: Path) -> None:
    simple(tmp_path).file(f"{WHERE}/driver_override", "vfio-pci")
    assert not unbind(BDF, machine=Kernel(tmp_path)).changed
    assert override_of(tmp_path) == "(null)"


@pytest.mark.usefixtures("one_look")
def test_unbind_waits_until_the_controller_is_live(tmp_path: Path) -> None:
    tree = simple(tmp_path)
    kernel = Kernel(tmp_path)
    bind(BDF, machine=kernel)
    tree.file(f"{WHERE}/nvme/nvme0/state", "connecting")
    with pytest.raises(TransportError, match="does not get ready"):
        unbind(BDF, machine=kernel)
    tree.file(f"{WHERE}/nvme/nvme0/state", "live")
    assert unbind(BDF, machine=kernel).after == "nvme"


def test_unbind_leaves_a_driven_controller_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The kernel would wait for that process, and so would we.
    simple(tmp_path)
    kernel = Kernel(tmp_path)
    bind(BDF, machine=kernel)
    kernel.writes.clear()
    monkeypatch.setattr(binding, "find_users", lambda nodes, _machine: ["process 5 (trainer)"] if nodes else [])
    with pytest.raises(UnsafeDeviceError, match=r"end process 5 \(trainer\) first"):
        unbind(BDF, machine=kernel)
    assert kernel.writes == []


def test_users_are_found_by_device_number(tmp_path: Path) -> None:
    tree = Tree(tmp_path)
    tree.process(5, "trainer", "/dev/null")
    tree.process(6, "other", "/dev/zero", "socket:[3]")
    tree.folder("/dev/vfio")
    tree.path("/dev/vfio/12").symlink_to("/dev/null")
    assert binding.find_users(["/dev/vfio/12", "/dev/vfio/13"], Kernel(tmp_path)) == ["process 5 (trainer)"]


@pytest.mark.parametrize(
    ("driver", "words"),
    [("vfio-pci", f"open it as pci:{BDF}"), ("gpunvme", "open it as kmod:/dev/gpunvme3")],
)
def test_bind_says_how_to_open_what_it_took(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], driver: str, words: str
) -> None:
    # Who opens a controller of our module by the address that VFIO wants is told that it is not bound.
    tree = simple(tmp_path)
    if driver == "gpunvme":
        tree.folder(f"{WHERE}/gpunvme/gpunvme3")
        tree.file("/dev/gpunvme3", "")
    monkeypatch.setattr(binding, "bind", lambda *_, **__: binding.Change(BDF, "nvme", driver, ("nvme0n1",)))
    monkeypatch.setattr(sysfs, "Machine", lambda: Kernel(tmp_path))
    nvme_devices.bind(BDF, driver)
    assert words in capsys.readouterr().out
