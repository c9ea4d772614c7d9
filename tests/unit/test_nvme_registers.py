"""Which registers are shown: what is not there must not be read, and nothing that is there may be missing."""

from __future__ import annotations

import pytest

from gpunvme.nvme import spec
from gpunvme.nvme.registers import Registers

ALWAYS = {"CAP", "VS", "INTMS", "INTMC", "CC", "CSTS", "AQA", "ASQ", "ACQ"}
BUFFER = {"CMBMSC", "CMBSTS", "CMBEBS", "CMBSWTP"}
PERSISTENT = {"PMRCAP", "PMRCTL", "PMRSTS", "PMREBS", "PMRSWTP", "PMRMSCL", "PMRMSCU"}


class Bar:
    """BAR0 that notes what is read of it. Each register but two reads as its own offset."""

    uri = "bar:"

    def __init__(self, cap: int, version: int) -> None:
        self.fixed = {spec.Register.CAP: cap, spec.Register.VS: version}
        self.seen: list[tuple[int, int]] = []

    def read_register(self, offset: int, nbytes: int) -> int:
        self.seen.append((offset, nbytes))
        return self.fixed.get(spec.Register(offset), offset)


@pytest.mark.parametrize(
    ("capabilities", "version", "more"),
    [
        ({}, 0x00010000, set()),
        ({}, 0x00010100, set()),
        ({}, 0x00010200, {"CMBLOC", "CMBSZ"}),
        ({"nssrs": 1}, 0x00010100, {"NSSR"}),
        ({"cmbs": 1}, 0x00010400, {"CMBLOC", "CMBSZ", *BUFFER}),
        ({"bps": 1}, 0x00010300, {"CMBLOC", "CMBSZ", "BPINFO", "BPRSEL", "BPMBL"}),
        ({"pmrs": 1, "crms": 3, "nsss": 1}, 0x00020000, {"CMBLOC", "CMBSZ", "CRTO", "NSSD", *PERSISTENT}),
    ],
)
def test_what_is_there_is_shown_and_nothing_else_is_read(
    capabilities: dict[str, int], version: int, more: set[str]
) -> None:
    bar = Bar(spec.Cap(mqes=7, **capabilities).encode(), version)
    registers = Registers(bar)  # type: ignore[arg-type]
    bar.seen.clear()
    shown = registers.dump()
    assert shown.keys() == ALWAYS | more
    assert {offset for offset, _ in bar.seen} == {spec.Register[name] for name in shown}
    wide = {"CAP", "ASQ", "ACQ", "BPMBL", "CMBMSC"}
    assert {spec.Register(offset).name for offset, nbytes in bar.seen if nbytes == 8} == wide & shown.keys()
    assert all(shown[name] == spec.Register[name] for name in shown.keys() - {"CAP", "VS"})
    assert registers.decoded()["CAP"]["mqes"] == 7
    assert registers.decoded().keys() <= shown.keys()
