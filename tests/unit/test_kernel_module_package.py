"""gpunvme-dkms_*.deb, the udev rule and the systemd unit: made, looked into, and their commands tried.

Whoever installs the package gets a module for the next kernel too, and gets rid of all of it again; a rule or a unit
with a wrong name in it is found at the next boot, without a word.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from gpunvme.cli.exits import Exit

ROOT = Path(__file__).resolve().parents[2]
TOOL = ROOT / "tools/kernel-module-package"
RULES = ROOT / "contrib/60-gpunvme.rules"
UNIT = ROOT / "contrib/gpunvme-bind@.service"
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]

needs_dpkg = pytest.mark.skipif(not shutil.which("dpkg-deb"), reason="there is no dpkg-deb")
needs_dkms = pytest.mark.skipif(not shutil.which("dkms"), reason="there is no dkms (apt-get install dkms)")


def run(*command: str | Path, timeout: float = 60, status: int = 0, **environment: str) -> str:
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        timeout=timeout,
        stdin=subprocess.DEVNULL,
        env={**os.environ, **environment},
    )
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(run(TOOL, "deb", tmp_path_factory.mktemp("deb")).strip())


@pytest.fixture(scope="module")
def unpacked(package: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unpacked")
    run("dpkg-deb", "--raw-extract", package, folder)
    return folder


# --- the package


def test_version_is_the_projects() -> None:
    assert run(TOOL, "version").strip() == VERSION


@needs_dpkg
def test_package_has_what_the_module_is_built_of(unpacked: Path) -> None:
    """A file that the build needs and DKMS has not is found on a user's machine."""
    source = unpacked / f"usr/src/gpunvme-{VERSION}"
    kbuild = (source / "Kbuild").read_text()
    objects = re.findall(r"(\w+)\.o", kbuild.split("gpunvme-y :=")[1])
    assert objects
    shipped = {path.name for path in source.iterdir()}
    assert {f"{name}.c" for name in objects} <= shipped
    for path in source.glob("*.[ch]"):
        assert set(re.findall(r'#include "([^"]+)"', path.read_text())) <= shipped
    assert not {name for name in shipped if name.endswith((".o", ".ko", ".mod.c", ".in"))}
    settings = (source / "dkms.conf").read_text()
    assert f'PACKAGE_VERSION="{VERSION}"' in settings
    # Nothing that was to be filled in is left anywhere.
    for path in [*source.iterdir(), *(unpacked / "DEBIAN").iterdir()]:
        assert not re.search(r"@[A-Z_]+@", path.read_text()), path


@needs_dpkg
def test_package_installs_rule_and_unit_and_enables_none(unpacked: Path) -> None:
    assert (unpacked / "usr/lib/udev/rules.d/60-gpunvme.rules").read_bytes() == RULES.read_bytes()
    assert (unpacked / "usr/lib/systemd/system/gpunvme-bind@.service").read_bytes() == UNIT.read_bytes()
    files = {str(path.relative_to(unpacked)) for path in unpacked.rglob("*") if not path.is_dir()}
    assert not {name for name in files if not name.startswith(("usr/", "DEBIAN/"))}
    assert not [path for path in unpacked.rglob("*") if path.is_symlink()]
    for script in (unpacked / "DEBIAN").glob("p*"):
        assert not re.search(r"(systemctl|deb-systemd-helper).* enable", script.read_text())
        run("sh", "-n", script)
        assert os.access(script, os.X_OK)


@needs_dpkg
def test_package_says_what_it_is(package: Path) -> None:
    assert package.name == f"gpunvme-dkms_{VERSION}_all.deb"
    for field, value in (("Package", "gpunvme-dkms"), ("Version", VERSION), ("Architecture", "all")):
        assert run("dpkg-deb", "--field", package, field).strip() == value
    assert "dkms" in run("dpkg-deb", "--field", package, "Depends")
    owners = {line.split()[1] for line in run("dpkg-deb", "--contents", package).splitlines()}
    assert owners == {"root/root"}


@needs_dpkg
def test_package_is_the_same_bit_by_bit(package: Path, tmp_path: Path) -> None:
    """Otherwise nobody can tell whether a package was made of what it says; not even with another umask."""
    command = f"umask 077; exec {TOOL} deb {tmp_path}"
    again = run("sh", "-c", command).strip()
    assert Path(again).read_bytes() == package.read_bytes()


def test_versions_that_are_not_final_come_before_it(tmp_path: Path) -> None:
    """0.2.0rc1 would be taken for newer than 0.2.0, and the release never be installed."""
    (tmp_path / "tools").mkdir()
    for name in ("contrib", "LICENSE"):
        (tmp_path / name).symlink_to(ROOT / name)
    shutil.copytree(ROOT / "kmod", tmp_path / "kmod")
    for name in ("gpunvme.mod.c", "gpunvme.o", "gpunvme.ko"):  # of a build in place
        (tmp_path / "kmod" / name).touch()
    tool = shutil.copy(TOOL, tmp_path / "tools")
    (tmp_path / "pyproject.toml").write_text('[project]\nversion = "0.2.0rc1"\n')
    assert run(tool, "version").strip() == "0.2.0rc1"
    if shutil.which("dpkg-deb"):
        made = run(tool, "deb", tmp_path, SOURCE_DATE_EPOCH="0").strip()
        assert made.endswith("/gpunvme-dkms_0.2.0~rc1_all.deb")
        contents = run("dpkg-deb", "--contents", made)
        assert "/usr/src/gpunvme-0.2.0rc1/dkms.conf" in contents
        assert not re.search(r"\.(mod\.c|o|ko)$", contents, re.MULTILINE)
    (tmp_path / "pyproject.toml").write_text("[project]\n")
    assert "names no version" in run(tool, "version", status=1)


def test_source_alone_for_systems_without_dpkg(tmp_path: Path) -> None:
    run("make", "-s", "-C", ROOT / "kmod", "dkms-source", f"DESTDIR={tmp_path}")
    assert f'"{VERSION}"' in (tmp_path / f"usr/src/gpunvme-{VERSION}/dkms.conf").read_text()


@pytest.mark.parametrize(
    ("release", "built"),
    [
        ("6.1.0-50-amd64", True),
        ("6.12.1", True),
        ("6.10.3-arch1-1", True),
        ("7.3.4+deb13-amd64", True),
        ("10.0.1", True),
        ("5.15.0-100-generic", False),
        ("6.0.19", False),
        ("4.18.0-553.el8", False),
    ],
)
def test_kernels_that_it_is_built_for(release: str, built: bool) -> None:
    """On an older kernel the build would fail, and with it the installation of everything else."""
    settings = (ROOT / "kmod/dkms.conf.in").read_text()
    (pattern,) = re.findall(r'^BUILD_EXCLUSIVE_KERNEL="(.*)"$', settings, re.MULTILINE)
    # As dkms asks: bash's =~.
    said = subprocess.run(["bash", "-c", f"[[ $1 =~ {pattern} ]]", "-", release], check=False, timeout=10)
    assert (said.returncode == 0) is built


@needs_dpkg
@pytest.mark.skipif(not shutil.which("lintian"), reason="there is no lintian (apt-get install lintian)")
def test_lintian_finds_nothing(package: Path) -> None:
    assert not run("lintian", "--allow-root", "--info", "--pedantic", package, timeout=100)


@pytest.mark.slow
@needs_dpkg
@needs_dkms
@pytest.mark.parametrize("kernel", ["debian-6.1", "debian-new"])
def test_dkms_builds_installs_and_removes_it(unpacked: Path, tmp_path: Path, kernel: str) -> None:
    """In trees of its own: nothing of the system's is touched."""
    headers = ROOT / "build/guest" / f"{kernel}-headers" / "tree"
    if not headers.exists():
        pytest.skip("the guests' headers are not here: run tools/guest-setup")
    release = (ROOT / "build/guest" / kernel / "version").read_text().strip()
    (tmp_path / "dkms").mkdir()
    (tmp_path / "modules" / release).mkdir(parents=True)
    trees = [
        *("--dkmstree", tmp_path / "dkms"),
        *("--sourcetree", unpacked / "usr/src"),
        *("--installtree", tmp_path / "modules"),
    ]
    which = [f"gpunvme/{VERSION}", "-k", release, "--kernelsourcedir", headers.resolve()]
    run("dkms", "add", f"gpunvme/{VERSION}", *trees)
    run("dkms", "install", "--no-depmod", *which, *trees, timeout=100)
    assert re.search(rf"gpunvme/{VERSION}, {re.escape(release)}, \w+: installed", run("dkms", "status", *trees))
    built = list((tmp_path / "modules").rglob("gpunvme.ko*"))
    assert [path.parent.name for path in built] == ["dkms"]
    run("dkms", "remove", "--no-depmod", f"gpunvme/{VERSION}", "--all", *trees)
    assert not run("dkms", "status", *trees).strip()
    assert not [path for path in (tmp_path / "modules").rglob("*") if path.is_file()]


# --- the unit


def commands() -> dict[str, list[str]]:
    """The unit's commands, as systemd would split them for one controller."""
    found = {}
    for line in UNIT.read_text().splitlines():
        key, _, value = line.partition("=")
        if key.startswith("Exec"):
            value = value.replace("%I", "ffff:ff:1f.7").replace("${DRIVER}", "vfio-pci").replace(" $OPTIONS", "")
            found[key] = value.split()
    return found


def test_unit_gives_back_what_it_took() -> None:
    assert commands() == {
        "ExecStart": ["gpunvme", "nvme", "bind", "ffff:ff:1f.7", "--driver", "vfio-pci"],
        "ExecStop": ["gpunvme", "nvme", "unbind", "ffff:ff:1f.7"],
    }
    assert "RemainAfterExit=yes" in UNIT.read_text()


@pytest.mark.parametrize(
    ("key", "more"), [("ExecStart", ["--noiommu", "--overwrite", "ffff:ff:1f.7"]), ("ExecStart", []), ("ExecStop", [])]
)
def test_units_commands_are_commands_of_ours(key: str, more: list[str]) -> None:
    """Its options reach the part that looks for the controller, which is not there: no usage error."""
    said = run(sys.executable, "-m", "gpunvme", *commands()[key][1:], *more, status=Exit.SYSTEM_REFUSED)
    assert "there is no PCI function" in said


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="there is no systemd-analyze")
def test_systemd_understands_the_unit(tmp_path: Path) -> None:
    """What it does not understand it ignores: a drive would be taken without what is meant to confine it."""
    stub = tmp_path / "gpunvme"
    stub.write_text("#!/bin/sh\n")
    stub.chmod(0o755)
    copy = tmp_path / UNIT.name
    copy.write_text(UNIT.read_text().replace("=gpunvme ", f"={stub} "))
    assert not run("systemd-analyze", "verify", copy)
    copy.write_text(copy.read_text().replace("ProtectClock", "ProtectClokc"))
    assert "ProtectClokc" in run("systemd-analyze", "verify", copy)


# --- the rule


@pytest.mark.skipif(not shutil.which("udevadm"), reason="there is no udevadm")
def test_udev_understands_the_rule() -> None:
    if "verify" not in run("udevadm", "--help"):
        pytest.skip("this udevadm cannot verify rules (systemd 254)")
    run("udevadm", "verify", RULES)


NVME, BRIDGE, GPU, SATA = "0x010802", "0x060400", "0x030000", "0x010601"


@pytest.mark.parametrize(
    ("classes", "given"),
    [
        ([NVME], True),
        ([BRIDGE, NVME], True),
        ([NVME, NVME], True),
        ([NVME, GPU], False),
        ([BRIDGE, NVME, SATA], False),
        ([GPU], False),
        ([BRIDGE], False),
        ([], False),
        (None, False),
    ],
)
def test_only_groups_with_nothing_but_drives_are_given_away(
    tmp_path: Path, classes: list[str] | None, given: bool
) -> None:
    """A group's file reaches all of its devices: with a graphics card in it, that too."""
    (program,) = re.findall(r"PROGRAM==\"/bin/sh -c '(.*?)'\"", RULES.read_text())
    assert "$" not in program  # udev's own sign
    for at, code in enumerate(classes or []):
        device = tmp_path / f"12/devices/0000:01:00.{at}"
        device.mkdir(parents=True)
        (device / "class").write_text(f"{code}\n")
    if classes is not None:
        (tmp_path / "12/devices").mkdir(parents=True, exist_ok=True)
    assert "/sys/kernel/iommu_groups/%k/" in program
    here = program.replace("/sys/kernel/iommu_groups/%k", str(tmp_path / "12"))
    done = subprocess.run(["/bin/sh", "-c", here], check=False, capture_output=True, timeout=10)
    assert (done.returncode == 0) is given


def test_rule_names_what_the_module_and_the_package_make() -> None:
    """A rule for another class matches nothing, and the group another than the package makes is ignored."""
    driver = (ROOT / "kmod/driver.c").read_text()
    assert "class_create(NAME)" in driver
    assert '#define NAME "gpunvme"' in driver
    lines = [line for line in RULES.read_text().splitlines() if line and not line.startswith("#")]
    assert all(line.endswith('GROUP="nvme", MODE="0660"') for line in lines)
    assert lines[0].startswith('SUBSYSTEM=="gpunvme",')
    assert "groupadd --system nvme" in (ROOT / "kmod/debian/postinst.in").read_text()
