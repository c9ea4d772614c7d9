"""Each NVMe drive: what it can take at once, whether it is hot, whether it is well."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gpunvme.doctor.checks_kernel import count_cpus
from gpunvme.doctor.finding import Finding, Level, unknown
from gpunvme.doctor.pcie import nvme_controllers
from gpunvme.errors import ControllerError
from gpunvme.nvme.identify import IdentifyController
from gpunvme.nvme.logs import SmartLog

if TYPE_CHECKING:
    from gpunvme.doctor.system import System

_WARM = 10  # degrees Celsius below the drive's own warning


def check_drives(system: System) -> list[Finding]:
    """Check each drive's state, firmware, queues, block size, transfer size and controller memory buffer."""
    findings = []
    for drive in nvme_controllers(system):
        where = f"/sys/class/nvme/{drive.name}"
        state = system.read(f"{where}/state")
        if state not in {None, "live"}:
            findings.append(
                Finding(
                    Level.RED,
                    "drive",
                    f"{drive.name} is {state}",
                    cost="it answers no commands",
                    fix="see why, then reset it; if that does not help: power off and on, other slot, other firmware",
                    commands=(f"sudo dmesg | grep {drive.name}", f"echo 1 | sudo tee {where}/reset_controller"),
                )
            )
            continue
        firmware = system.read(f"{where}/firmware_rev")
        if firmware is None:
            findings.append(unknown("drive", f"{drive.name}: firmware", system.unreadable(f"{where}/firmware_rev")))
            continue
        findings.append(_shape(system, drive.name, where, firmware))
    return findings


def _shape(system: System, name: str, where: str, firmware: str) -> Finding:
    """Judge the sizes of a drive that is alive."""
    queues = system.read_int(f"{where}/queue_count")
    disk = next((each for each in system.names(where) if each.startswith(f"{name}n")), f"{name}n1")
    block = f"/sys/class/block/{disk}/queue"
    if not system.exists(block):
        block = f"{where}/{disk}/queue"
    largest = system.read_int(f"{block}/max_hw_sectors_kb")
    lba = system.read_int(f"{block}/logical_block_size")
    facts = [
        f"firmware {firmware}",
        "queues unknown" if queues is None else f"{max(queues - 1, 0)} I/O queues",
        "transfer size unknown" if largest is None else f"transfers up to {largest} KiB",
        "LBA unknown" if lba is None else f"LBA {lba} bytes",
        _controller_memory(system, where),
    ]
    answer = system.probes.nvme_admin(f"/dev/{name}")
    if isinstance(answer, str):
        facts.append(f"MDTS unknown ({answer})")
    else:
        try:
            identify = IdentifyController.decode(answer.identify)
            facts.append(f"MDTS {identify.mdts or 'without limit'}")
        except (ControllerError, ValueError) as error:
            facts.append(f"MDTS unknown ({error})")
    fact = f"{name}: {', '.join(facts)}"
    cpus = count_cpus(system.read("/sys/devices/system/cpu/online") or "")
    if queues is not None and cpus and 1 < queues <= cpus:
        return Finding(
            Level.YELLOW,
            "drive",
            fact,
            cost=f"{cpus} CPUs share its queues; small reads of many threads wait for each other",
            fix="nothing to set: the drive, or the host of this virtual machine, gives no more",
        )
    return Finding(Level.GREEN, "drive", fact)


def _controller_memory(system: System, where: str) -> str:
    """Return what the kernel says about a controller memory buffer: ``cmb`` holds CMBLOC and CMBSZ."""
    text = system.read(f"{where}/cmb")
    if text is None:
        return "no CMB shown"
    sizes = [line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("cmbsz")]
    try:
        value = int(sizes[0], 16)
    except (IndexError, ValueError):
        return "CMB unknown"
    # CMBSZ: bits 11:8 unit, 4 KiB times 16 to its power; 31:12 size. NVMe over PCIe 1.0, 3.1.1.
    nbytes = (value >> 12) * (4096 << 4 * (value >> 8 & 0xF))
    return f"CMB {nbytes / 2**20:g} MiB" if nbytes else "no CMB"


def check_heat(system: System) -> list[Finding]:
    """Check each drive's temperature against its own warning, and how long it was throttled because of heat."""
    findings = []
    for drive in nvme_controllers(system):
        if drive.transport != "pcie":
            continue
        found = _sensor(system, drive.name)
        now, most = found
        answer = system.probes.nvme_admin(f"/dev/{drive.name}")
        health: SmartLog | None = None
        why = answer if isinstance(answer, str) else ""
        if not isinstance(answer, str):
            try:
                health = SmartLog.decode(answer.health)
            except (ControllerError, ValueError) as error:
                why = str(error)
        if now is None and health is not None:
            now = health.celsius
        if now is None:
            findings.append(
                unknown("heat", drive.name, f"no sensor in /sys/class/nvme/{drive.name}{f'; {why}' if why else ''}")
            )
            continue
        fact = f"{drive.name}: {now} °C" + (f", warns at {most} °C" if most is not None else "")
        cooling = "give it a heat sink and air; a second look: sudo gpunvme nvme smart, or sudo nvme smart-log"
        if health is not None and health.critical_warning:
            findings.append(
                Finding(
                    Level.RED,
                    "heat",
                    f"{fact}; it warns: {'; '.join(health.warnings) or hex(health.critical_warning)}",
                    cost="it slows down, or loses data",
                    fix="back up what is on it, then: sudo nvme smart-log",
                )
            )
        elif most is not None and now >= most:
            findings.append(Finding(Level.RED, "heat", fact, cost="it slows itself down to cool", fix=cooling))
        elif most is not None and now >= most - _WARM:
            findings.append(
                Finding(Level.YELLOW, "heat", fact, cost="under load it will slow itself down", fix=cooling)
            )
        elif health is not None and _throttled(health):
            findings.append(
                Finding(
                    Level.YELLOW,
                    "heat",
                    f"{fact}; throttled for {_throttled(health)} s of its life",
                    cost="long loads are slower than short ones",
                    fix=cooling,
                )
            )
        else:
            told = "never throttled" if health is not None else f"throttling unknown ({why})"
            findings.append(Finding(Level.GREEN, "heat", f"{fact}; {told}"))
    return findings


def _throttled(health: SmartLog) -> int:
    """Return the seconds in which a drive slowed itself down because of heat."""
    minutes = health.warning_temperature_time + health.critical_temperature_time
    return health.thermal_management_1_time + health.thermal_management_2_time + 60 * minutes


def _sensor(system: System, name: str) -> tuple[int | None, int | None]:
    """Return a drive's temperature and the one that it warns at, in degrees Celsius, from its hwmon folder."""
    for folder in (f"/sys/class/nvme/{name}", f"/sys/class/nvme/{name}/hwmon", f"/sys/class/nvme/{name}/device/hwmon"):
        for entry in system.names(folder):
            if entry.startswith("hwmon"):
                now = system.read_int(f"{folder}/{entry}/temp1_input")
                most = system.read_int(f"{folder}/{entry}/temp1_max")
                if now is not None:
                    return now // 1000, most // 1000 if most is not None and 0 < most < 200_000 else None
    return None, None
