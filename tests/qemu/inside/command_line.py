"""In a guest: `gpunvme nvme …` from taking a controller to giving it back.

0000:00:08.0 "first" is taken; 0000:00:09.0 "table" has a partition table.
"""

from __future__ import annotations

import contextlib
import io
import json

import numpy as np
from checking import check, modprobe, namespace_path

from gpunvme.cli.app import run
from gpunvme.nvme.sysfs import find_function

FIRST, TABLE = "0000:00:08.0", "0000:00:09.0"


def gpunvme(*arguments: str) -> tuple[int, str]:
    """Run a command line; return its exit status and what it printed."""
    out = io.TextIOWrapper(io.BytesIO(), write_through=True)
    errors = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
        status = run(["nvme", *arguments])
    return status, out.buffer.getvalue().decode(errors="replace") + errors.getvalue()


def answer(*arguments: str) -> dict[str, object]:
    status, said = gpunvme(*arguments, "--json")
    assert status == 0, said
    return json.loads(said)


@check()
def drive_is_taken_used_and_given_back() -> None:
    modprobe("nvme")
    for nsid in (1, 2, 3):
        namespace_path(FIRST, nsid)
    listed = {each["function"]["address"]: each for each in answer("list")["controllers"]}
    assert listed[FIRST]["serial"] == "first", listed
    assert "from nvme to vfio-pci" in gpunvme("bind", FIRST)[1]
    assert answer("identify", f"pci:{FIRST}")["serial"] == "first"
    assert "smart" in answer("smart", f"pci:{FIRST}")
    assert answer("regs", f"pci:{FIRST}")["registers"]["VS"] >= 0x10000
    data = np.random.default_rng(8).integers(0, 256, 1 << 20, np.uint8).tobytes()
    with open("/run/data", "wb") as file:
        file.write(data)
    where = ("--lba", "64", "--namespace", "2")
    answer("write", f"pci:{FIRST}", "/run/data", *where)
    answer("read", f"pci:{FIRST}", "--blocks", "256", "--out", "/run/copy", *where)
    with open("/run/copy", "rb") as file:
        assert file.read() == data
    assert answer("topology")["pairs"] == []
    assert answer("unbind", FIRST)["after"] == "nvme"
    with open(namespace_path(FIRST, 2), "rb") as disk:
        disk.seek(64 * 4096)
        assert disk.read(1 << 20) == data


@check()
def refusals_are_lines_and_statuses() -> None:
    namespace_path(TABLE)
    status, said = gpunvme("bind", TABLE)
    assert (status, "partition table (MBR)" in said, "Traceback" in said) == (7, True, False), said
    assert find_function(TABLE).driver == "nvme"
    status, said = gpunvme("identify", f"pci:{TABLE}")
    assert (status, f"gpunvme nvme bind {TABLE}" in said) == (4, True), said
    status, said = gpunvme("bind", "0000:00:00.0")
    assert (status, "no NVMe controller" in said) == (4, True), said
    status, said = gpunvme("bind", "somewhere")
    assert (status, "no PCI address" in said) == (3, True), said
