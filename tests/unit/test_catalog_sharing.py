"""Several at one catalog: one writer at a time, and readers that read one generation or say that they cannot."""

from __future__ import annotations

import gc
import threading
from typing import TYPE_CHECKING, Any

import pytest

import catalog_cases
import files
import gpunvme
from gpunvme import nvme

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture(params=["file", "namespace"])
def target(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Any]:
    if request.param == "file":
        yield tmp_path / "catalog"
    else:
        with nvme.open("soft:ram?size=16MiB&lba=512") as controller:
            yield controller.namespace()


def data(number: int) -> bytes:
    return bytes([number % 256]) * 20_000


def test_one_writer_at_a_time(target: Any) -> None:
    with gpunvme.Catalog.create(target) as writer:
        writer.add(1, data(1))
        with pytest.raises(gpunvme.CatalogError, match="another object of this process"):
            gpunvme.Catalog(target, "r+")
        with pytest.raises(gpunvme.CatalogError, match="another object of this process"):
            gpunvme.Catalog.create(target, overwrite=str(target))
        with gpunvme.Catalog(target) as reader:
            assert reader.mode == "r"
    with gpunvme.Catalog(target, "r+") as writer:
        writer.add(2, data(2))


FORKS = """
import fcntl, os, sys
import gpunvme

with gpunvme.Catalog(sys.argv[1], "r+") as writer:
    child = os.fork()
    if child == 0:
        refused = ""
        try:
            writer.add(2, b"child's")
        except gpunvme.CatalogError as error:
            refused = str(error)
        writer.close()  # takes nothing away from the parent
        os._exit(7 if "belongs to the process" in refused else 1)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    writer.add(3, b"parent's")
    try:
        with open(sys.argv[1], "rb") as other:
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print("locked")
    try:
        gpunvme.Catalog(sys.argv[1], "r+")
    except gpunvme.CatalogError as error:
        print(error)
"""


def test_a_forked_child_does_not_write(tmp_path: Path) -> None:
    path = tmp_path / "catalog"
    gpunvme.Catalog.create(path).close()
    said = files.output(FORKS, path)
    assert said.startswith("7\nlocked\nanother object of this process")
    with gpunvme.Catalog(path) as reader:
        assert [region.kind for region in reader] == [3]


def test_a_writer_that_was_forgotten_is_in_nobodys_way(target: Any) -> None:
    writer = gpunvme.Catalog.create(target)
    writer.add(1, data(1))
    del writer
    gc.collect()
    with gpunvme.Catalog(target, "r+") as another:
        another.add(2, data(2))


def test_one_process_writes(tmp_path: Path) -> None:
    path = tmp_path / "catalog"
    with gpunvme.Catalog.create(path) as writer:
        writer.add(1, data(1))
        with gpunvme.open(path, "r+") as other, pytest.raises(gpunvme.CatalogError, match="another object"):
            gpunvme.Catalog(other, "r+")
        assert "another process writes this catalog" in files.python(OPENS, path).stderr
    files.output(OPENS, path)


OPENS = "import sys, gpunvme; gpunvme.Catalog(sys.argv[1], 'r+')"


def test_a_reader_keeps_its_generation_until_it_may_be_overwritten(target: Any) -> None:
    with gpunvme.Catalog.create(target) as writer:
        writer.add(1, data(1))
        with gpunvme.Catalog(target) as reader:
            writer.replace(1, data(2))
            assert catalog_cases.stored(reader) == {1: ("", data(1))}
            assert reader.verify() == []
            writer.replace(1, data(3))
            for use in (
                lambda: reader.read_kind(1),
                lambda: reader.gather_kind(1, [0]),
                lambda: reader.load(framework="np"),
                reader.verify,
                reader.check,
            ):
                with pytest.raises(gpunvme.CatalogChangedError, match="generation 4 by now"):
                    use()
            assert reader.refresh() is True
            assert catalog_cases.stored(reader) == {1: ("", data(3))}
            assert reader.refresh() is False
        # What the writer itself reads is checked in the same way.
        old = writer._generation
        writer.replace(1, data(4))
        writer._check_current(old)
        writer.replace(1, data(5))
        with pytest.raises(gpunvme.CatalogChangedError):
            writer._check_current(old)


def test_the_generation_before_stays_while_the_next_one_is_written(target: Any) -> None:
    for again in (False, True):
        with gpunvme.Catalog.create(target, overwrite=word(target)) as writer:
            writer.add(1, data(1))
            reader = gpunvme.Catalog(target)
            writer.replace(1, data(2))
            if not again:
                write_beside(writer, reader)
        if again:  # by another writer, which has to find out what there was
            with gpunvme.Catalog(target, "r+") as writer:
                write_beside(writer, reader)


def word(target: Any) -> str:
    return "ram" if isinstance(target, nvme.Namespace) else str(target)


def write_beside(writer: gpunvme.Catalog, reader: gpunvme.Catalog) -> None:
    with reader, writer.change() as change:
        for kind in range(10, 20):
            change.add(kind, data(kind))
        assert catalog_cases.stored(reader) == {1: ("", data(1))}
        assert catalog_cases.stored(writer) == {1: ("", data(2))}


def test_a_catalog_made_anew_is_another_one(tmp_path: Path) -> None:
    path = tmp_path / "catalog"
    gpunvme.Catalog.create(path).close()
    with gpunvme.Catalog(path) as reader:
        with gpunvme.Catalog.create(path, overwrite=str(path)) as made:
            assert made.generation == reader.generation
        with pytest.raises(gpunvme.CatalogChangedError):
            reader.check()
        assert reader.refresh() is True


def test_readers_beside_a_writer_never_see_a_mixture(target: Any) -> None:
    """Every region of a generation holds the same number; a reader that sees two has read garbage."""
    done = threading.Event()
    wrong: list[str] = []
    seen: set[int] = set()
    changed = 0

    def reading() -> None:
        nonlocal changed
        try:
            with gpunvme.Catalog(target) as reader:
                while not done.is_set():
                    try:
                        numbers = {
                            byte for region in reader for byte in set(reader.read_kind(region.kind).numpy().ravel())
                        }
                    except gpunvme.CatalogChangedError:
                        changed += 1
                        reader.refresh()
                        continue
                    if len(numbers) != 1:
                        wrong.append(f"{numbers} in generation {reader.generation}")
                    seen.update(numbers)
                    reader.refresh()
        except BaseException as error:  # noqa: BLE001  # in a thread: told below
            wrong.append(repr(error))

    with gpunvme.Catalog.create(target) as writer:
        with writer.change() as change:
            for kind in (1, 2, 3):
                change.add(kind, data(0))
        threads = [threading.Thread(target=reading) for _ in range(2)]
        for thread in threads:
            thread.start()
        for number in range(1, 25):
            with writer.change() as change:
                for kind in (1, 2, 3):
                    change.replace(kind, data(number))
        done.set()
        for thread in threads:
            thread.join(60)
    assert wrong == []
    assert seen


def test_changes_of_several_threads_come_one_after_the_other(tmp_path: Path) -> None:
    with gpunvme.Catalog.create(tmp_path / "catalog") as writer:

        def add(first: int) -> None:
            for kind in range(first, first + 5):
                writer.add(kind, data(kind))

        threads = [threading.Thread(target=add, args=(10 * i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert len(writer) == 20
        assert writer.generation == 21
        assert writer.verify() == []
