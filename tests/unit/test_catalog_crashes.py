"""A writer that dies, a drive that loses power: the old catalog or the new one, every byte of it as it was written.

A file notes every write and flush. What a drive may hold afterwards is made from the note: everything up to a flush,
and any sectors of what came later, in any order.
"""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import catalog_cases
import gpunvme
from gpunvme.catalog.generation import NoCatalogError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    Contents = dict[int, tuple[str, bytes]]

DATA = np.random.default_rng(3).bytes(70_000)


def states_after(image: bytes, *, writable: bool = False) -> Contents:
    """What a catalog on this image holds, after every region was compared with its checksum."""
    with catalog_cases.memory_file(image) as file, gpunvme.Catalog(file, "r+" if writable else "r") as catalog:
        assert catalog.verify() == []
        found = catalog_cases.stored(catalog)
        if writable:  # and it can be gone on with
            catalog.add(None, DATA[:9000])
            assert catalog.verify() == []
        return found


def recorded(change: Callable[[gpunvme.Catalog], Any], beginning: Callable[[gpunvme.Catalog], Any]) -> Any:
    """The image before a change, what the change wrote, and both catalogs' contents."""
    with catalog_cases.recorder() as file:
        with gpunvme.Catalog.create(file) as catalog:
            beginning(catalog)
        image = file.read().numpy().tobytes()
        file.log.clear()
        with gpunvme.Catalog(file, "r+") as catalog:
            old = catalog_cases.stored(catalog)
            change(catalog)
            new = catalog_cases.stored(catalog)
        return image, list(file.log), old, new


def beginning(catalog: gpunvme.Catalog) -> None:
    catalog.add(1, DATA[:5000], name="a")
    catalog.add(2, DATA[5000:30000], name="b")
    catalog.replace(1, DATA[100:7000])  # so that there is a generation before, and a gap
    catalog.add(3, b"")


def many(catalog: gpunvme.Catalog) -> None:
    with catalog.change() as change:
        change.delete(1)
        change.replace("b", DATA[:20000], name="c")
        change.add(9, DATA[3:3000])


CHANGES: dict[str, Callable[[gpunvme.Catalog], Any]] = {
    "add": lambda catalog: catalog.add(None, DATA, name="new"),
    "replace": lambda catalog: catalog.replace("b", DATA[1:]),
    "delete": lambda catalog: catalog.delete(2),
    "many at once": many,
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_loss_of_power_leaves_the_old_catalog_or_the_new(what: str) -> None:
    image, log, old, new = recorded(CHANGES[what], beginning)
    assert old != new
    # Data, table, superblock, each on the drive before the next; and the last one before it returns.
    assert [entry is None for entry in log[-5:]] == [True, False, True, False, True]
    seen = []
    for number, crashed in enumerate(catalog_cases.after_crashes(image, log, np.random.default_rng(1))):
        found = states_after(crashed, writable=number % 4 == 0)
        assert found in (old, new)
        seen.append(found == new)
    assert seen[0] is False
    assert seen[-1] is True
    # What was flushed stays: once all sectors of the new superblock are there, nothing brings the old one back.
    assert seen.count(True) < len(seen) / 2


def test_every_length_of_a_torn_superblock() -> None:
    image, log, old, new = recorded(CHANGES["add"], beginning)
    writes = [entry for entry in log if entry is not None]
    offset, superblock = writes[-1]
    before = catalog_cases.applied(image, writes[:-1])
    found = set()
    for length in range(0, 513, 8):
        for rest in (b"", bytes(512 - length), b"\xff" * (512 - length)):
            torn = catalog_cases.applied(before, [(offset, superblock[:length] + rest)])
            now = states_after(torn)
            assert now in (old, new)
            found.add(now == new)
    assert found == {True, False}


def test_two_changes_after_a_torn_superblock() -> None:
    """The generation that was torn is written again, over space that the one before it may have had."""
    image, log, old, _ = recorded(CHANGES["many at once"], beginning)
    writes = [entry for entry in log if entry is not None]
    offset, superblock = writes[-1]
    torn = catalog_cases.applied(image, [*writes[:-1], (offset, superblock[:100] + bytes(412))])
    with catalog_cases.memory_file(torn) as file, gpunvme.Catalog(file, "r+") as catalog:
        assert catalog_cases.stored(catalog) == old
        for number in range(4):
            catalog.replace("b", DATA[number:])
            assert catalog.verify() == []


def test_a_killed_writer_of_the_first_generation_leaves_nothing_or_a_catalog() -> None:
    with catalog_cases.recorder() as file:
        gpunvme.Catalog.create(file).close()
        log = list(file.log)
    seen = []
    for crashed in catalog_cases.after_crashes(b"", log, np.random.default_rng(1)):
        try:
            seen.append(states_after(crashed) == {})
        except gpunvme.CatalogError:
            seen.append(False)
    assert seen[0] is False
    assert seen[-1] is True


def test_packing_leaves_the_old_catalog_or_the_new(tmp_path: Path) -> None:
    tensors = {f"layer.{i}": np.random.default_rng(i).standard_normal((31, i + 1)) for i in range(6)}
    gpunvme.save_file(tensors, tmp_path / "model.safetensors")
    from gpunvme.catalog import pack

    def packed(catalog: gpunvme.Catalog) -> None:
        target = catalog._target.file
        catalog.close()
        pack(tmp_path / "model.safetensors", target, only=True)

    with catalog_cases.recorder() as file:
        with gpunvme.Catalog.create(file) as catalog:
            beginning(catalog)
            old = catalog_cases.stored(catalog)
        image = file.read().numpy().tobytes()
        file.log.clear()
        pack(tmp_path / "model.safetensors", file, only=True)
        with gpunvme.Catalog(file) as catalog:
            new = catalog_cases.stored(catalog)
            assert {name for name, _ in new.values()} == tensors.keys()
        for crashed in catalog_cases.after_crashes(image, file.log, np.random.default_rng(1), each=2):
            assert states_after(crashed) in (old, new)


@settings(max_examples=max(8, settings().max_examples // 5))
@given(st.data())
def test_any_changes_one_after_the_other(data: st.DataObject) -> None:
    """Crashes between and within several changes: what was true before the change, or after it."""
    random = np.random.default_rng(data.draw(st.integers(0, 1000)))
    with catalog_cases.recorder() as file, gpunvme.Catalog.create(file) as catalog:
        for _ in range(data.draw(st.integers(1, 5))):
            old = catalog_cases.stored(catalog)
            image = file.read().numpy().tobytes()
            file.log.clear()
            with catalog.change() as change:
                for _ in range(data.draw(st.integers(1, 3))):
                    there = [region.kind for region in change.regions]
                    size = data.draw(st.sampled_from([0, 1, 4095, 4096, 4097, 20000]))
                    what = data.draw(st.sampled_from(["add", "replace", "delete"] if there else ["add"]))
                    if what == "add":
                        change.add(None, random.bytes(size))
                    elif what == "replace":
                        change.replace(data.draw(st.sampled_from(there)), random.bytes(size))
                    else:
                        change.delete(data.draw(st.sampled_from(there)))
            new = catalog_cases.stored(catalog)
            for crashed in catalog_cases.after_crashes(image, file.log, random, each=1):
                assert states_after(crashed) in (old, new)


@pytest.mark.parametrize("what", CHANGES)
def test_a_writer_that_fails_at_any_write_goes_on(what: str) -> None:
    """Not a crash: an error, and the same object is used again."""
    _, log, old, new = recorded(CHANGES[what], beginning)
    for fails in range(len(log)):
        with catalog_cases.recorder() as file, gpunvme.Catalog.create(file) as catalog:
            beginning(catalog)
            file.left = fails
            with pytest.raises(catalog_cases.Stopped):
                CHANGES[what](catalog)
            file.left = -1
            assert catalog_cases.stored(catalog) == old
            written = [entry for entry in file.log if entry is not None]
            file.log.clear()
            catalog.add(77, DATA[:100])
            if fails == len(log) - 1:
                # After a flush that failed the page cache may call clean what never arrived: it is written again.
                assert file.log[0] == written[-1]
            found = catalog_cases.stored(catalog)
            del found[77]
            # Only the last flush comes after the superblock: then the change is in force.
            assert found == (new if fails == len(log) - 1 else old)
            with gpunvme.Catalog(file) as reader:
                assert reader.verify() == []
                assert catalog_cases.stored(reader) == catalog_cases.stored(catalog)


KILLED = """
import os, sys
import gpunvme

left = int(sys.argv[2])

class Dying(gpunvme.File):
    def write_from(self, *arguments, **options):
        global left
        left -= 1
        if left < 0:
            os.kill(os.getpid(), 9)
        return super().write_from(*arguments, **options)

with Dying(sys.argv[1], "r+") as file, gpunvme.Catalog(file, "r+") as catalog:
    with catalog.change() as change:
        change.replace("b", bytes(range(256)) * 300)
        change.add(None, b"new", name="n")
print("done")
"""


def test_kill_9_at_every_write(tmp_path: Path) -> None:
    left = 0
    while True:
        path = tmp_path / f"killed{left}"
        with gpunvme.Catalog.create(path) as catalog:
            beginning(catalog)
            old = catalog_cases.stored(catalog)
        run = subprocess.run(
            [sys.executable, "-c", KILLED, path, str(left)], capture_output=True, text=True, timeout=60, check=False
        )
        with gpunvme.Catalog(path, "r+") as catalog:  # the lock went with the writer
            assert catalog.verify() == []
            if run.returncode == 0:
                assert catalog["n"].nbytes == 3
                break
            assert run.returncode == -9, run.stderr
            assert catalog_cases.stored(catalog) == old
        os.unlink(path)
        left += 1
    assert left >= 4


def test_a_new_file_appears_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpunvme.save_file({"x": np.ones(9)}, tmp_path / "model.safetensors")
    from gpunvme.catalog import pack
    from gpunvme.catalog.target import Target

    monkeypatch.setattr(Target, "flush", lambda self: (_ for _ in ()).throw(gpunvme.FileError(5, "no", self.name)))
    with pytest.raises(gpunvme.FileError):
        pack(tmp_path / "model.safetensors", tmp_path / "target")
    assert sorted(os.listdir(tmp_path)) == ["model.safetensors"]


def test_nothing_is_a_catalog_without_one(tmp_path: Path) -> None:
    for image in (b"", b"x", bytes(511), bytes(600), bytes(2 << 20)):
        with pytest.raises(NoCatalogError, match="there is no catalog"):
            states_after(image)


def test_a_source_that_fails_leaves_no_write_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is still being written lands in space that is free, and would be in the next region's way."""
    from gpunvme.catalog import FilePart
    from gpunvme.catalog.target import Target

    stopped: list[gpunvme.Transfer] = []
    stop = Target.stop

    def watched(target: Target, writing: gpunvme.Transfer) -> None:
        stop(target, writing)
        assert writing.done
        stopped.append(writing)

    monkeypatch.setattr(Target, "stop", watched)
    monkeypatch.setattr("gpunvme.catalog.contents.PIECE", 1 << 20)
    with gpunvme.Catalog.create(tmp_path / "catalog") as catalog, gpunvme.open(tmp_path / "source", "w") as source:
        source.write_from(DATA)
        os.truncate(tmp_path / "source", 2 << 20)
        part = FilePart(source, 0, 2 << 20)
        read_into = source.read_into
        reads = []

        def second_fails(*arguments: Any, **options: Any) -> Any:
            reads.append(arguments)
            if len(reads) == 2:
                raise gpunvme.FileError(5, "no", "source")
            return read_into(*arguments, **options)

        monkeypatch.setattr(source, "read_into", second_fails)
        with pytest.raises(gpunvme.FileError, match="no"):
            catalog.add(1, part)
        assert len(stopped) == 1
        assert len(catalog) == 0
