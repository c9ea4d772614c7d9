"""Any sequence of what one can do with tiers, beside a dictionary that does the same."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from on_tiers import NAMES, Tiers, nothing_left_over, on_disk

import gpunvme

FILES = ["a", "b", "deep/a", "deep/er/b"]
name = st.sampled_from(FILES)
tier = st.sampled_from(NAMES)
content = st.binary(max_size=200)
CAPACITY = 500


class Model(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.root = Path(tempfile.mkdtemp(prefix="gpunvme-tiers-"))
        self.directories = {each: self.root / each for each in NAMES}
        for directory in self.directories.values():
            directory.mkdir()
        self.contents: dict[str, bytes] = {}
        self.tiers: dict[str, str] = {}
        self.accesses: dict[str, int] = {}
        self.pinned: set[str] = set()
        self.opened: list[tuple[gpunvme.File, bytes]] = []
        self.now = 1e9

    def teardown(self) -> None:
        for file, _ in self.opened:
            file.close()
        self.made.close()
        shutil.rmtree(self.root)

    @initialize()
    def start(self) -> None:
        self.made = Tiers(self.directories, capacity={"nvme": CAPACITY}, half_life=None, clock=lambda: self.now)

    @rule()
    def restart(self) -> None:
        self.made.close()
        self.start()

    def fits(self, name: str, nbytes: int) -> bool:
        others = (each for each, at in self.tiers.items() if at == "nvme" and each != name)
        return sum(len(self.contents[each]) for each in others) + nbytes <= CAPACITY

    @rule(name=name, data=content, tier=tier, replace=st.booleans(), move=st.booleans())
    def add(self, name: str, data: bytes, tier: str, replace: bool, move: bool) -> None:
        source = self.root / "source"
        source.write_bytes(data)
        if name in self.contents and not replace:
            with pytest.raises(gpunvme.FileError, match="already"):
                self.made.add(source, name, tier=tier, move=move)
        elif tier == "nvme" and not self.fits(name, len(data)):
            with pytest.raises(gpunvme.TierFullError):
                self.made.add(source, name, tier=tier, replace=replace, move=move)
        else:
            assert self.made.add(source, name, tier=tier, replace=replace, move=move) == tier
            self.contents[name], self.tiers[name] = data, tier
            self.accesses.setdefault(name, 0)
            assert source.exists() != move
            return
        assert source.read_bytes() == data

    @rule(name=name)
    def remove(self, name: str) -> None:
        if name in self.contents:
            self.made.remove(name)
            del self.contents[name], self.tiers[name], self.accesses[name]
            self.pinned.discard(name)
        else:
            with pytest.raises(gpunvme.MissingFileError):
                self.made.remove(name)

    @rule(name=name, keep=st.booleans())
    def open(self, name: str, keep: bool) -> None:
        if name not in self.contents:
            with pytest.raises(gpunvme.MissingFileError):
                self.made.open(name)
            return
        file = self.made.open(name)
        assert file.read().numpy().tobytes() == self.contents[name]
        self.accesses[name] += 2  # opened, and read
        if keep:
            self.opened.append((file, self.contents[name]))
        else:
            file.close()

    @rule(name=name, tier=tier)
    def migrate(self, name: str, tier: str) -> None:
        if name not in self.contents:
            with pytest.raises(gpunvme.MissingFileError):
                self.made.migrate(name, tier)
        elif name in self.pinned and tier != self.tiers[name]:
            with pytest.raises(gpunvme.TierError, match="pinned"):
                self.made.migrate(name, tier)
        elif tier == "nvme" and self.tiers[name] != "nvme" and not self.fits(name, len(self.contents[name])):
            with pytest.raises(gpunvme.TierFullError):
                self.made.migrate(name, tier)
        else:
            assert self.made.migrate(name, tier) == (tier != self.tiers[name])
            self.tiers[name] = tier

    @precondition(lambda self: self.contents)
    @rule(data=st.data(), pinned=st.booleans())
    def pin(self, data: st.DataObject, pinned: bool) -> None:
        name = data.draw(st.sampled_from(sorted(self.contents)))
        if pinned:
            self.made.pin(name)
            self.pinned.add(name)
        else:
            self.made.unpin(name)
            self.pinned.discard(name)

    @rule(name=name)
    def heat_up(self, name: str) -> None:
        if name in self.contents:
            self.made.touch(name, 11)
            self.accesses[name] += 11

    @rule()
    def balance(self) -> None:
        before = dict(self.tiers)
        for decision in self.made.balance():
            assert self.tiers[decision.name] == decision.source
            assert decision.name not in self.pinned
            self.tiers[decision.name] = decision.destination
        for each in self.pinned:
            assert self.tiers[each] == before[each]

    @rule(name=name)
    def auto(self, name: str) -> None:
        if name in self.contents:
            decision = self.made.auto_tier(name)
            assert decision.source == self.tiers[name]
            assert not (decision.moved and name in self.pinned)
            self.tiers[name] = decision.destination

    @invariant()
    def everything_is_there_exactly_once(self) -> None:
        expected = {f"{self.tiers[each]}/{each}": data for each, data in self.contents.items()}
        assert on_disk(self.directories) == expected
        assert nothing_left_over(self.directories)

    @invariant()
    def status_says_so(self) -> None:
        status = self.made.status()
        assert {file.name: file.tier for file in status.files} == self.tiers
        assert {file.name: file.accesses for file in status.files} == self.accesses
        assert {file.name for file in status.files if file.pinned} == self.pinned
        assert not status.troubles
        assert status.tiers[0].nbytes <= CAPACITY

    @invariant()
    def open_files_stay_readable(self) -> None:
        for file, data in self.opened[-3:]:
            assert file.size == len(data)
            assert gpunvme.File.read_into(file, bytearray(len(data))).nbytes == len(data)


Model.TestCase.settings = settings(
    settings.default, max_examples=max(10, settings.default.max_examples // 5), stateful_step_count=20
)
TestModel = Model.TestCase
