"""Catalogs compared with a dict, whatever is done in whatever order: files, and both block sizes."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

import catalog_cases
import gpunvme
from gpunvme import nvme

SIZES = st.sampled_from([0, 1, 511, 512, 4095, 4096, 4097, 12288, 50_000])
NAMES = st.sampled_from(["", "a", "b", "ü", "a/b"])


class Model(RuleBasedStateMachine):
    """Kinds are drawn from few numbers, so that they meet."""

    def __init__(self) -> None:
        super().__init__()
        self.random = np.random.default_rng(5)
        self.held: dict[int, tuple[str, bytes]] = {}
        self.open_target()
        self.catalog = gpunvme.Catalog.create(self.target)

    def open_target(self) -> None:
        self.target: Any = catalog_cases.recorder()

    def close_target(self) -> None:
        self.target.close()

    def free(self, name: str, kind: int | None = None) -> bool:
        return not name or all(name != other for number, (other, _) in self.held.items() if number != kind)

    @rule(kind=st.none() | st.integers(0, 6), name=NAMES, size=SIZES)
    def add(self, kind: int | None, name: str, size: int) -> None:
        data = self.random.bytes(size)
        try:
            kind = self.catalog.add(kind, data, name=name).kind
        except gpunvme.CatalogError:
            assert kind in self.held or not self.free(name)
        else:
            assert kind not in self.held
            assert self.free(name)
            self.held[kind] = (name, data)

    @rule(kind=st.integers(0, 6), name=st.none() | NAMES, size=SIZES)
    def replace(self, kind: int, name: str | None, size: int) -> None:
        data = self.random.bytes(size)
        try:
            self.catalog.replace(kind, data, name=name)
        except gpunvme.CatalogError:
            assert kind not in self.held or not self.free(name or "", kind)
        else:
            self.held[kind] = (self.held[kind][0] if name is None else name, data)

    @rule(kind=st.integers(0, 6) | NAMES.filter(bool))
    def delete(self, kind: int | str) -> None:
        number = kind if isinstance(kind, int) else next((k for k, (n, _) in self.held.items() if n == kind), None)
        try:
            self.catalog.delete(kind)
        except gpunvme.CatalogError:
            assert number not in self.held
        else:
            del self.held[number]

    @rule(kinds=st.lists(st.integers(7, 12), min_size=1, max_size=4, unique=True), fails=st.booleans())
    def change(self, kinds: list[int], fails: bool) -> None:
        held = dict(self.held)
        try:
            with self.catalog.change() as change:
                for kind in kinds:
                    if kind in held:
                        change.delete(kind)
                        del held[kind]
                    else:
                        held[kind] = ("", self.random.bytes(6000 + kind))
                        change.add(kind, held[kind][1])
                if fails:
                    raise KeyError
        except KeyError:
            return
        self.held = held

    @rule()
    def reopen(self) -> None:
        self.catalog.close()
        self.catalog = gpunvme.Catalog(self.target, "r+")

    @precondition(lambda self: isinstance(self.target, catalog_cases.Recorder))
    @rule(left=st.integers(0, 6), size=SIZES)
    def crash(self, left: int, size: int) -> None:
        """The process dies at a write; another one goes on."""
        data = self.random.bytes(size)
        held = {**self.held, 6: ("", data)}
        self.target.left = left
        try:
            with self.catalog.change() as change:
                if 6 in self.held:
                    change.delete(6)
                change.add(6, data)
            self.held = held
        except catalog_cases.Stopped:
            self.target.left = -1
            self.reopen()
            found = catalog_cases.stored(self.catalog)
            assert found in (self.held, held)
            self.held = found
        self.target.left = -1

    @invariant()
    def holds_what_was_put_in(self) -> None:
        assert catalog_cases.stored(self.catalog) == self.held
        assert self.catalog.verify() == []
        places = sorted((region.offset, region.nbytes) for region in self.catalog if region.nbytes)
        for (offset, nbytes), (following, _) in itertools.pairwise(places):
            assert offset + nbytes <= following

    def teardown(self) -> None:
        self.catalog.close()
        self.close_target()


class ModelOnBlocks(Model):
    block_size = 512

    def open_target(self) -> None:
        self.controller = nvme.open(f"soft:ram?size=8MiB&lba={self.block_size}")
        self.target = self.controller.namespace()

    def close_target(self) -> None:
        self.controller.close()


class ModelOnLargeBlocks(ModelOnBlocks):
    block_size = 4096


# Each step of each example looks at everything that is stored.
_EXAMPLES = max(8, settings.get_profile(settings.get_current_profile_name()).max_examples // 5)

TestModel = Model.TestCase
TestModel.settings = settings(max_examples=_EXAMPLES, stateful_step_count=15)
TestModelOnBlocks = ModelOnBlocks.TestCase
TestModelOnBlocks.settings = settings(max_examples=_EXAMPLES // 3 + 1, stateful_step_count=15)
TestModelOnLargeBlocks = ModelOnLargeBlocks.TestCase
TestModelOnLargeBlocks.settings = settings(max_examples=_EXAMPLES // 3 + 1, stateful_step_count=15)
