"""The whole of `gpunvme accept`, with steps and a drive that are made up: its order, and that the drive comes back.

If these fail, a person's drive stays with the wrong driver, is written to when it must not be, or a serial number is
sent to strangers.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from accept_steps import CUSTODY, driver_of, log_of, step
from gpunvme.accept.drive import Drive
from gpunvme.accept.result import Outcome
from gpunvme.accept.session import Acceptance, Wish, accept
from gpunvme.nvme.sysfs import Machine, list_controllers
from nvme_machine import simple

if TYPE_CHECKING:
    from gpunvme.accept.children import Step

MIB = 1 << 20
CLEAR = step("clears", "nvme")


def drive(root: Path) -> Drive:
    """The drive of a machine that is made up, as if it had been looked at."""
    (info,) = list_controllers(Machine(root))
    return Drive(info, "1.0", nsid=1, nbytes=64 * MIB, block_size=512, area=8 * MIB, area_nbytes=8 * MIB, far=56 * MIB)


def run(folder: Path, *plan: Step, **wishes: object) -> Acceptance:
    """Run a plan on a drive that the folder stands for."""
    root = folder / "root"
    if not root.exists():
        simple(root)
    (folder / "driver").write_text("nvme")
    wish = Wish(directory=str(folder), **wishes)  # type: ignore[arg-type]
    return accept(drive(root), wish, plan=plan, clear=CLEAR, custody=CUSTODY, machine=Machine(root))


def outcomes(acceptance: Acceptance) -> list[tuple[str, str]]:
    return [(row.step, row.outcome.value) for row in acceptance.rows]


def test_the_drive_goes_from_hand_to_hand_and_back(tmp_path: Path) -> None:
    acceptance = run(
        tmp_path, step("passes", "nvme"), step("passes", "vfio-pci"), step("passes"), step("passes", "gpunvme")
    )
    assert log_of(tmp_path) == [
        "passes with nvme, uri '', left None",
        "take vfio-pci",
        "passes with vfio-pci, uri 'pci:0000:01:00.0', left 5",
        "passes with vfio-pci, uri 'pci:0000:01:00.0', left 5",
        "give back",
        "take gpunvme",
        "passes with gpunvme, uri 'pci:0000:01:00.0', left 5",
        "give back",
        "clears with nvme",
    ]
    assert acceptance.passed
    assert driver_of(tmp_path) == "nvme"


def test_hangs_and_crashes_are_rows_and_the_rest_goes_on(tmp_path: Path) -> None:
    broken = [step("hangs", "vfio-pci", seconds=2), step("crashes", "vfio-pci")]
    acceptance = run(tmp_path, step("passes", "nvme"), *broken, step("passes", "vfio-pci"))
    assert outcomes(acceptance) == [
        ("passes", "passed"),
        ("take for vfio-pci", "passed"),
        ("hangs", "failed"),
        ("crashes", "failed"),
        ("passes", "passed"),
        ("give back", "passed"),
        ("clears", "passed"),
    ]
    # What a step that failed had written is not known to those that follow.
    assert "passes with vfio-pci, uri 'pci:0000:01:00.0', left None" in log_of(tmp_path)
    assert not acceptance.passed
    assert driver_of(tmp_path) == "nvme"


def test_a_driver_that_is_not_there_leaves_its_steps_out(tmp_path: Path) -> None:
    acceptance = run(
        tmp_path, step("passes", "absent"), step("passes", "absent"), step("passes", "nvme", follows="absent")
    )
    assert outcomes(acceptance)[:4] == [
        ("take for absent", "skipped"),
        ("passes", "skipped"),
        ("passes", "skipped"),
        ("passes", "skipped"),
    ]
    assert acceptance.rows[2].reason == "there is no driver absent"
    assert acceptance.rows[3].reason == "nothing was done with absent"
    assert log_of(tmp_path).count("take absent") == 1
    # Nothing ran, nothing failed: that is no success.
    assert not acceptance.passed or acceptance.count(Outcome.PASSED) == 1


def test_a_drive_that_was_taken_by_half_is_given_back_first(tmp_path: Path) -> None:
    run(tmp_path, step("passes", "breaks"), step("passes", "nvme"))
    assert log_of(tmp_path)[:3] == ["take breaks", "give back", "passes with nvme, uri '', left None"]


def test_what_is_missing_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    acceptance = run(tmp_path, step("machine"), step("passes", "vfio-pci", gpu=True), step("passes"), skip=("mach",))
    assert [row.reason for row in acceptance.rows[:2]] == ["left out, as asked for", "the machine was not looked at"]
    acceptance = run(tmp_path, step("machine"), step("passes", "vfio-pci", gpu=True))
    assert acceptance.rows[1].reason == "there is no GPU"
    # No driver was changed for a step that was left out, and nothing was written.
    assert log_of(tmp_path)[-1] == "give back"
    monkeypatch.chdir(tmp_path)  # where custody notes what it does, now that nothing is named
    root = tmp_path / "root"
    acceptance = accept(
        drive(root), Wish(), plan=(step("passes", directory=True),), clear=CLEAR, custody=CUSTODY, machine=Machine(root)
    )
    assert acceptance.rows[0].reason == "no directory was named: --directory DIR"


def test_nothing_is_written_where_somebody_else_has_written(tmp_path: Path) -> None:
    acceptance = run(tmp_path, step("refuses", "nvme", vital=True), step("passes", "vfio-pci"))
    assert outcomes(acceptance) == [("refuses", "failed"), ("passes", "skipped"), ("give back", "passed")]
    assert log_of(tmp_path) == ["give back"], "its zeros would have gone over somebody's data"
    acceptance = run(tmp_path, step("raises", "nvme", vital=True), step("passes", "vfio-pci"))
    assert outcomes(acceptance)[-1] == ("clears", "passed"), "what it had written was left"


def test_a_guard_that_was_killed_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from gpunvme.accept import session

    class Killed(session.Guard):
        def __init__(self, *arguments: object) -> None:
            super().__init__(*arguments)  # type: ignore[arg-type]
            self._process.kill()
            self._process.wait(20)

    monkeypatch.setattr(session, "Guard", Killed)
    acceptance = run(tmp_path, step("passes", "vfio-pci"))
    assert outcomes(acceptance)[-2:] == [("give back", "passed"), ("clears", "passed")]
    assert driver_of(tmp_path) == "nvme"


def test_nothing_private_is_in_the_document(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "root"
    tree = simple(root)
    tree.file("/sys/bus/pci/devices/0000:01:00.0/nvme/nvme0/serial", "S7KGNX0W")
    tree.file("/sys/class/block/nvme0n1/wwid", "eui.0025384331b0c1d2")
    secrets = ["S7KGNX0W", "eui.0025384331b0c1d2", str(tmp_path), os.uname().nodename, "annemarie"]
    monkeypatch.setenv("SUDO_USER", "annemarie")
    monkeypatch.setenv("ACCEPT_SAYS", f"serial {' and '.join(secrets)} but not S7KGNX0WX")
    plan = step("says", "nvme")
    text = json.dumps(run(tmp_path, plan).document())
    for secret in secrets:
        if len(secret) > 2:
            assert f"{secret} " not in text, secret
            assert f'{secret}"' not in text, secret
    assert "serial SERIAL and SERIAL and DIRECTORY" in text
    assert "S7KGNX0WX" in text
    asked = run(tmp_path, plan, serials=True).document()
    assert asked["drive"]["serial"] == "S7KGNX0W"
    assert "serial numbers, as asked for" in asked["private"]


def test_the_document_has_a_version_and_every_row(tmp_path: Path) -> None:
    acceptance = run(tmp_path, step("passes", "nvme"), step("skips", "nvme"), step("raises", "nvme"))
    document = json.loads(json.dumps(acceptance.document()))
    assert (document["schema"], document["schema_version"]) == ("gpunvme.accept", 1)
    assert document["summary"] == {"passed": 3, "failed": 1, "skipped": 1}
    first = document["steps"][0]
    assert (first["step"], first["outcome"], first["reason"]) == ("passes", "passed", "it went well")
    assert first["figures"] == [{"what": "read", "value": 2.5, "unit": "GB/s", "limit": 7.0, "limit_what": "the link"}]
    assert first["facts"] == {}, "what is for other steps is not for strangers"


# --- ended from outside: in a process of its own

PROGRAM = """
import sys
from pathlib import Path
import test_accept_session as tests
from accept_steps import step
acceptance = tests.run(Path(sys.argv[1]), step("hangs", "vfio-pci"), step("passes", "vfio-pci"))
print(acceptance.interrupted, tests.outcomes(acceptance), flush=True)
"""


def start(folder: Path) -> subprocess.Popen[str]:
    """Start a session, and wait until its drive is with vfio-pci and a step hangs."""
    here = Path(__file__).parent
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(here), str(here.parent), *filter(None, sys.path)])}
    running = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(folder)], stdout=subprocess.PIPE, text=True, env=environment
    )
    wait_until(lambda: any(line.startswith("hangs") for line in log_of(folder)))
    assert driver_of(folder) == "vfio-pci"
    return running


def wait_until(condition: object) -> None:
    give_up = time.monotonic() + 100
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < give_up
        time.sleep(0.02)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_interrupted_the_drive_is_given_back(tmp_path: Path, number: signal.Signals) -> None:
    running = start(tmp_path)
    running.send_signal(number)
    said, _ = running.communicate(timeout=60)
    assert said.startswith("True [('take for vfio-pci', 'passed'), ('give back', 'passed'), ('clears', 'passed')]"), (
        said
    )
    assert driver_of(tmp_path) == "nvme"


def test_killed_the_drive_is_given_back_and_no_step_lives_on(tmp_path: Path) -> None:
    running = start(tmp_path)
    hanging = int(next(line for line in log_of(tmp_path) if line.startswith("hangs")).split()[1])
    running.kill()
    running.communicate(timeout=60)
    wait_until(lambda: driver_of(tmp_path) == "nvme")
    wait_until(lambda: not Path(f"/proc/{hanging}").exists())
    assert log_of(tmp_path)[-1] == "give back"
