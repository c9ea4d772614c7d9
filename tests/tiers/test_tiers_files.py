"""Files added, opened, moved and removed: what comes in comes out, and nothing else is touched."""

from __future__ import annotations

import errno
import os
import shutil
import stat
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from on_tiers import Tiers, nothing_left_over, on_disk

import files
import gpunvme
from gpunvme.tiers import copying
from gpunvme.tiers.directory import TierDirectory

if TYPE_CHECKING:
    from collections.abc import Callable


def test_a_file_goes_to_the_fastest_tier_and_stays_itself(tiers: Tiers, source: Path) -> None:
    source.chmod(0o640)
    os.utime(source, ns=(1_000_000_000, 1_234_567_890_000_000_000))
    assert tiers.add(source) == "nvme"
    assert tiers.add(source, "deep/er/copy", tier="hdd") == "hdd"
    assert source.read_bytes() == b"content"
    for name in ("source", "deep/er/copy"):
        assert tiers.read(name) == b"content"
        status = os.stat(tiers.where(name))
        assert stat.S_IMODE(status.st_mode) == 0o640
        assert status.st_mtime_ns == 1_234_567_890_000_000_000
    with pytest.raises(gpunvme.FileError, match="already") as caught:
        tiers.add(source)
    assert caught.value.errno == 17


def test_large_files_go_through_in_pieces(tiers: Tiers, tmp_path: Path) -> None:
    data = files.make(tmp_path / "large", 2 * copying.CHUNK + 12_345)
    tiers.add(tmp_path / "large", tier="hdd")
    opened = tiers.open("large")
    assert tiers.migrate("large", "nvme")
    assert tiers.migrate("large", "ssd", rate=1e12)
    assert tiers.read("large") == data
    assert opened.read().numpy().tobytes() == data  # the copy on the first tier is gone, but not for who has it open
    opened.close()


def test_what_lies_on_a_tier_already_is_put_on_record_where_it_is(tiers: Tiers, directories: dict[str, Path]) -> None:
    (directories["ssd"] / "sub").mkdir()
    (directories["ssd"] / "sub" / "there").write_bytes(b"there")
    inode = (directories["ssd"] / "sub" / "there").stat().st_ino
    assert tiers.add(directories["ssd"] / "sub" / "there") == "ssd"
    assert os.stat(tiers.where("sub/there")).st_ino == inode
    with pytest.raises(gpunvme.FileError, match="already"):
        tiers.add(directories["ssd"] / "sub" / "there")
    with pytest.raises(gpunvme.TierError, match="on record as"):
        tiers.add(directories["ssd"] / "sub" / "there", "elsewhere", move=True)
    with pytest.raises(gpunvme.TierNameError, match="belongs to the tiers"):
        tiers.add(directories["nvme"] / ".gpunvme-tier" / "state.sqlite", "state", move=True)
    (directories["ssd"] / "second").write_bytes(b"second")
    assert tiers.add(directories["ssd"] / "second", tier="hdd") == "hdd"
    assert on_disk(directories) == {"ssd/sub/there": b"there", "hdd/second": b"second"}


BAD = ["", "/etc/passwd", "..", "../x", "a/../b", "a//b", "a/", "./a", "a/.", "a\0b", "a\nb", "\x1b[2J", "\udce9"]
BAD += [
    ".gpunvme-tier",
    ".gpunvme-tier/state.sqlite",
    "x" * 256,
    "ü" * 128,
    "/".join("x" * 33),
    "/".join(["y" * 250] * 5),
]


@pytest.mark.parametrize("name", BAD)
def test_names_that_lead_elsewhere_are_refused_everywhere(
    tiers: Tiers, source: Path, directories: dict[str, Path], name: str
) -> None:
    calls: list[Callable[[], object]] = [
        lambda: tiers.add(source, name),
        lambda: tiers.open(name),
        lambda: tiers.remove(name),
        lambda: tiers.migrate(name, "hdd"),
        lambda: tiers.auto_tier(name),
        lambda: tiers.pin(name),
        lambda: tiers.where(name),
    ]
    for call in calls:
        with pytest.raises(gpunvme.TierNameError):
            call()
    assert on_disk(directories) == {}


@pytest.mark.parametrize(
    "name", ["a", "x" * 255, "ü" * 127, ".hidden", "a b", "-rf", "模/型", "...", "a\\b", "/".join("x" * 32)]
)
def test_other_names_are_fine(tiers: Tiers, source: Path, name: str) -> None:
    tiers.add(source, name)
    tiers.migrate(name, "hdd")
    assert tiers.read(name) == b"content"
    tiers.remove(name)


def test_links_are_never_followed_out_of_a_tier(tiers: Tiers, source: Path, directories: dict[str, Path]) -> None:
    secret = directories["nvme"].parent / "secret"
    secret.mkdir()
    (secret / "x").write_bytes(b"secret")
    tiers.add(source, "deep/x", tier="nvme")
    shutil.rmtree(directories["nvme"] / "deep")
    (directories["nvme"] / "deep").symlink_to(secret)
    for call in (tiers.open, lambda name: tiers.migrate(name, "hdd")):
        with pytest.raises(gpunvme.FileError, match="link"):
            call("deep/x")
    with pytest.raises(gpunvme.FileError):
        tiers.remove("deep/x")
    (directories["hdd"] / "deep").symlink_to(secret)
    with pytest.raises(gpunvme.FileError):
        tiers.add(source, "deep/y", tier="hdd")
    tiers.add(source, "leaf", tier="nvme")
    (directories["nvme"] / "leaf").unlink()
    (directories["nvme"] / "leaf").symlink_to(secret / "x")
    with pytest.raises(gpunvme.FileError, match="link"):
        tiers.open("leaf")
    assert (secret / "x").read_bytes() == b"secret"
    assert os.listdir(secret) == ["x"]


def test_what_is_no_file_is_refused(tiers: Tiers, source: Path, directories: dict[str, Path]) -> None:
    os.mkfifo(source.parent / "fifo")
    for bad in (source.parent, source.parent / "fifo", source.parent / "missing"):
        with pytest.raises(gpunvme.FileError):
            tiers.add(bad)
    (source.parent / "link").symlink_to(source)
    with pytest.raises(gpunvme.FileError, match="symbolic link"):
        tiers.add(source.parent / "link", move=True)
    assert tiers.add(source.parent / "link") == "nvme"
    tiers.add(source, "pipe")
    (directories["nvme"] / "pipe").unlink()
    os.mkfifo(directories["nvme"] / "pipe")
    with pytest.raises(gpunvme.FileError, match="not a regular file"):
        tiers.open("pipe")


def test_a_stranger_in_the_way_is_left_alone(tiers: Tiers, source: Path, directories: dict[str, Path]) -> None:
    tiers.add(source, "x", tier="nvme")
    (directories["hdd"] / "x").write_bytes(b"somebody's")
    with pytest.raises(gpunvme.TierError, match="not on record"):
        tiers.migrate("x", "hdd")
    assert on_disk(directories) == {"nvme/x": b"content", "hdd/x": b"somebody's"}
    assert nothing_left_over(directories)
    (directories["hdd"] / "x").unlink()
    assert tiers.migrate("x", "hdd")


def test_file_systems_without_hard_links(
    tiers: Tiers, source: Path, directories: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as FAT and exFAT: a stranger in the way is left alone there, too."""

    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", refuse)
    tiers.add(source, "deep/x", tier="nvme")
    (directories["hdd"] / "deep").mkdir()
    (directories["hdd"] / "deep" / "x").write_bytes(b"somebody's")
    with pytest.raises(gpunvme.TierError, match="not on record"):
        tiers.migrate("deep/x", "hdd")
    assert tiers.migrate("deep/x", "ssd")
    assert on_disk(directories) == {"ssd/deep/x": b"content", "hdd/deep/x": b"somebody's"}
    assert nothing_left_over(directories)


def test_a_file_that_somebody_removed_is_missing_not_empty(tiers: Tiers, source: Path) -> None:
    tiers.add(source)
    os.unlink(tiers.where("source"))
    with pytest.raises(gpunvme.MissingFileError, match="on tier 'nvme', but somebody removed it"):
        tiers.open("source")
    tiers.remove("source")
    assert tiers.status().files == ()


# Sources that change.


@pytest.fixture
def meanwhile(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[int], None]], None]:
    """Have something done after each copy was made, and before it is compared with its source."""

    def install(action: Callable[[int], None]) -> None:
        original, times = copying.checksum_of, iter(range(100))

        def compare(*args: Any) -> str:
            action(next(times))
            return original(*args)

        monkeypatch.setattr(copying, "checksum_of", compare)

    return install


def test_a_source_that_changes_meanwhile_is_copied_anew(
    tiers: Tiers, source: Path, meanwhile: Any, directories: dict[str, Path]
) -> None:
    tiers.add(source, "x", tier="nvme")
    place = Path(tiers.where("x"))
    meanwhile(lambda time: place.write_bytes(b"changed!") if time == 0 else None)
    assert tiers.migrate("x", "hdd")
    assert on_disk(directories) == {"hdd/x": b"changed!"}


def test_a_source_that_is_replaced_meanwhile_is_copied_anew(
    tiers: Tiers, source: Path, meanwhile: Any, directories: dict[str, Path]
) -> None:
    tiers.add(source, "x", tier="nvme")
    place = Path(tiers.where("x"))

    def replace(time: int) -> None:
        if time == 0:
            (place.parent / "new").write_bytes(b"replaced")
            os.rename(place.parent / "new", place)

    meanwhile(replace)
    assert tiers.migrate("x", "hdd")
    assert on_disk(directories) == {"hdd/x": b"replaced"}


def test_a_source_that_changes_all_the_time_stays(
    tiers: Tiers, source: Path, meanwhile: Any, directories: dict[str, Path]
) -> None:
    tiers.add(source, "x", tier="nvme")
    place = Path(tiers.where("x"))
    meanwhile(lambda time: place.write_bytes(b"%d" % time))
    with pytest.raises(gpunvme.TierError, match="written to all the time"):
        tiers.migrate("x", "hdd")
    assert on_disk(directories) == {"nvme/x": b"2"}
    assert nothing_left_over(directories)


def test_a_write_after_the_switch_is_not_lost(
    tiers: Tiers, source: Path, directories: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever writes into the old copy just before it goes gets it back, and the move starts anew."""
    tiers.add(source, "x", tier="nvme")
    place = directories["nvme"] / "x"
    remove_temporary, late = TierDirectory.remove_temporary, [b"late!"]

    def write_first(self: TierDirectory, temporary: str) -> None:
        if late:
            place.write_bytes(late.pop())
        remove_temporary(self, temporary)

    monkeypatch.setattr(TierDirectory, "remove_temporary", write_first)
    assert tiers.migrate("x", "hdd")
    assert not late
    assert on_disk(directories) == {"hdd/x": b"late!"}


def test_an_original_that_was_written_to_is_kept(
    tiers: Tiers, source: Path, meanwhile: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, late = TierDirectory.place, [b"late!"]

    def write_first(self: TierDirectory, *args: Any, **options: Any) -> None:
        source.write_bytes(late.pop())
        place(self, *args, **options)

    monkeypatch.setattr(TierDirectory, "place", write_first)
    tiers.add(source, "x", move=True)
    assert (tiers.read("x"), source.read_bytes()) == (b"content", b"late!")


def test_a_copy_that_reads_back_differently_is_not_taken(
    tiers: Tiers, source: Path, directories: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    tiers.add(source, "x", tier="nvme")
    monkeypatch.setattr(copying, "checksum_of", lambda *_: "0" * 32)
    with pytest.raises(gpunvme.FileError, match="reads back differently"):
        tiers.migrate("x", "hdd")
    assert on_disk(directories) == {"nvme/x": b"content"}
    assert nothing_left_over(directories)


def test_what_a_drive_damaged_is_not_carried_on(tiers: Tiers, source: Path, directories: dict[str, Path]) -> None:
    tiers.add(source, "x", tier="nvme")
    place = Path(tiers.where("x"))
    time = place.stat().st_mtime_ns
    place.write_bytes(b"c0ntent")
    os.utime(place, ns=(time, time))  # nobody wrote to it, its time says
    with pytest.raises(gpunvme.TierError, match="another checksum"):
        tiers.migrate("x", "hdd")
    assert on_disk(directories) == {"nvme/x": b"c0ntent"}


# Order.


def test_nothing_is_removed_before_its_copy_is_durable(
    tiers: Tiers, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiers.add(source, "deep/x", tier="nvme")
    steps: list[str] = []
    fsync, link, unlink = os.fsync, os.link, os.unlink
    switch = type(tiers._moves)._switch

    def kind(fd: int) -> str:
        return "fsync directory" if stat.S_ISDIR(os.fstat(fd).st_mode) else "fsync file"

    monkeypatch.setattr(os, "fsync", lambda fd: (steps.append(kind(fd)), fsync(fd)))
    monkeypatch.setattr(os, "link", lambda *a, **k: (steps.append("link"), link(*a, **k)))
    monkeypatch.setattr(os, "unlink", lambda path, **k: (steps.append(f"unlink {path}"), unlink(path, **k)))
    monkeypatch.setattr(type(tiers._moves), "_switch", lambda self, row: (steps.append("switch"), switch(self, row))[1])
    tiers.migrate("deep/x", "hdd")
    monkeypatch.undo()
    order = [steps.index(step) for step in ("fsync file", "link", "switch", "unlink x")]
    assert order == sorted(order)
    assert "fsync directory" in steps[steps.index("link") : steps.index("switch")]


# Full, missing and read-only tiers.


def test_budgets(make: Callable[..., Tiers], source: Path, directories: dict[str, Path]) -> None:
    tiers = make(capacity={"nvme": 10, "ssd": 6})
    assert tiers.add(source, "first") == "nvme"
    assert tiers.add(source, "second") == "hdd"  # 14 bytes are more than 10, and 7 more than 6
    with pytest.raises(gpunvme.TierFullError, match="may hold 10 bytes and has 7"):
        tiers.migrate("second", "nvme")
    tiers.touch("second", 100)
    decision = tiers.auto_tier("second")
    assert not decision.moved
    assert "may hold 10 bytes" in str(decision)
    assert "may hold 6 bytes" in str(decision)
    assert [str(each) for each in tiers.balance()] == [
        "first: nvme → hdd (by its accesses)",
        "second: hdd → nvme (by its accesses)",
    ]
    again = make()  # another one keeps to the same budgets
    assert [tier.capacity for tier in again.status().tiers] == [10, 6, None]
    with pytest.raises(gpunvme.TierFullError, match="no tier has room"):
        make(capacity={"hdd": 8}).add(source, "third")
    assert nothing_left_over(directories)


def test_a_replacement_needs_only_the_room_that_it_adds(make: Callable[..., Tiers], tmp_path: Path) -> None:
    tiers = make(capacity={"nvme": 10})
    for nbytes, fits in ((8, True), (10, True), (11, False), (9, True)):
        data = files.make(tmp_path / "x", nbytes, seed=nbytes)
        if fits:
            assert tiers.add(tmp_path / "x", tier="nvme", replace=True) == "nvme"
            assert tiers.read("x") == data
        else:
            with pytest.raises(gpunvme.TierFullError, match="may hold 10 bytes and has 0"):
                tiers.add(tmp_path / "x", tier="nvme", replace=True)


FULL = """
import sys, os, gpunvme
root = sys.argv[1]
tiers = gpunvme.TierManager({"small": root + "/small", "large": root + "/large"})
open(root + "/source", "wb").write(os.urandom(3 << 20))
assert tiers.add(root + "/source", "x") == "large", "more than the tmpfs has"
try:
    tiers.migrate("x", "small")
except gpunvme.TierFullError as error:
    assert "free" in str(error), error
from gpunvme.tiers.directory import TierDirectory
TierDirectory.space = lambda self: (1 << 40, False)  # found only when it is written
try:
    tiers.migrate("x", "small")
except gpunvme.TierFullError as error:
    assert "stays where it is" in str(error), error
else:
    raise SystemExit("it fits?")
assert tiers.where("x") == root + "/large/x"
assert os.listdir(root + "/small/.gpunvme-tier/incoming") == []
assert tiers.open("x").read().numpy().tobytes() == open(root + "/source", "rb").read()
"""

READ_ONLY = """
import sys, os, subprocess, gpunvme
root = sys.argv[1]
tiers = gpunvme.TierManager({"large": root + "/large", "small": root + "/small"})
open(root + "/source", "wb").write(b"content")
tiers.add(root + "/source", "x", tier="small")
tiers.add(root + "/source", "y", tier="large")
subprocess.run(["mount", "-o", "remount,ro", root + "/small"], check=True)
def refused(call, *args):
    try:
        call(*args)
    except gpunvme.TierUnavailableError as error:
        assert "read-only" in str(error), error
    else:
        raise SystemExit("not refused")
refused(tiers.migrate, "x", "large")
refused(tiers.migrate, "y", "small")
refused(tiers.remove, "x")
assert tiers.open("x").read().numpy().tobytes() == b"content"
assert tiers.status().tiers[1].trouble == "read-only"
assert tiers.balance() == [], "nothing is even tried"
subprocess.run(["umount", root + "/small"], check=True)
try:
    tiers.open("x")
except gpunvme.TierUnavailableError as error:
    assert "mounted" in str(error), error
tiers.close()
tiers = gpunvme.TierManager({"large": root + "/large", "small": root + "/small"})
assert "mounted" in tiers.status().troubles[0] and "mounted" in tiers.status().tiers[1].trouble
assert tiers.open("y").read().numpy().tobytes() == b"content"
assert os.listdir(root + "/small") == [], "written to where a disk should be mounted"
"""


@pytest.mark.parametrize("program", [FULL, READ_ONLY], ids=["full", "read-only, then gone"])
def test_a_small_file_system(program: str, tmp_path: Path) -> None:
    files.need_mounts()
    (tmp_path / "small").mkdir()
    (tmp_path / "large").mkdir()
    script = 'mount -t tmpfs -o size=2m none "$1/small" && exec "$2" -W ignore -c "$3" "$1"'
    files.ended_well(files.run([*files.PRIVATE_MOUNTS, "sh", "-c", script, "sh", tmp_path, sys.executable, program]))


def test_a_tier_that_goes_away_takes_only_its_files_with_it(
    make: Callable[..., Tiers], source: Path, directories: dict[str, Path]
) -> None:
    tiers = make()
    tiers.add(source, "here", tier="nvme")
    tiers.add(source, "away", tier="ssd")
    directories["ssd"].rename(directories["ssd"].parent / "unplugged")
    for again in (tiers, make()):
        assert again.read("here") == b"content"
        with pytest.raises(gpunvme.TierUnavailableError, match=r"tier 'ssd' at .* cannot be reached"):
            again.open("away")
        with pytest.raises(gpunvme.TierUnavailableError):
            again.remove("away")
        assert "cannot be reached" in again.status().tiers[1].trouble
        assert again.add(source, f"new-{id(again)}") == "nvme"
        assert not again.auto_tier("away").moved
    (directories["ssd"].parent / "unplugged").rename(directories["ssd"])
    assert make().read("away") == b"content"


def test_a_move_whose_old_tier_goes_away_is_finished_later(
    make: Callable[..., Tiers], source: Path, directories: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    tiers = make()
    tiers.add(source, "x", tier="ssd")
    unplugged = directories["ssd"].parent / "unplugged"
    switch = type(tiers._moves)._switch
    monkeypatch.setattr(
        type(tiers._moves),
        "_switch",
        lambda self, row: (switch(self, row), directories["ssd"].rename(unplugged))[0],
    )
    with pytest.raises(gpunvme.TierError, match="is on tier 'hdd' now, but its old copy"):
        tiers.migrate("x", "hdd")
    assert tiers.read("x") == b"content"
    monkeypatch.undo()
    unplugged.rename(directories["ssd"])
    tiers.balance()
    assert on_disk(directories) == {"hdd/x": b"content"}


# What the constructor refuses.


def test_tiers_that_make_no_sense(tmp_path: Path, directories: dict[str, Path], make: Callable[..., Tiers]) -> None:
    inside = directories["nvme"] / "inside"
    inside.mkdir()
    for bad in ({}, {"": tmp_path}, {"a=b": tmp_path}, {"a": directories["nvme"], "b": inside}):
        with pytest.raises(ValueError):
            gpunvme.TierManager(bad)
    with pytest.raises(ValueError, match="inside"):
        gpunvme.TierManager({"a": tmp_path / "ssd", "b": tmp_path / "ssd"})
    for options in ({"hot": 1, "warm": 2}, {"half_life": 0}, {"rate": 0}, {"moves": 0}, {"capacity": {"tape": 1}}):
        with pytest.raises(ValueError):
            make(**options)
    with pytest.raises(gpunvme.TierUnavailableError, match="cannot be reached"):
        gpunvme.TierManager({"a": tmp_path / "missing"})
    make()
    swapped = {"nvme": directories["nvme"], "ssd": directories["hdd"], "hdd": directories["ssd"]}
    with pytest.raises(gpunvme.TierStateError, match="swapped"):
        make(tiers=swapped)
    (tmp_path / "new").mkdir()
    gpunvme.TierManager({"new": tmp_path / "new"}).close()
    with pytest.raises(gpunvme.TierStateError, match="belongs to other tiers"):
        gpunvme.TierManager({"new": tmp_path / "new", "hdd": directories["hdd"]})
    with pytest.raises(gpunvme.TierStateError, match="has a record, but not at"):
        gpunvme.TierManager({"hdd": directories["hdd"]})


def test_a_tier_with_files_must_be_named(
    make: Callable[..., Tiers], source: Path, directories: dict[str, Path]
) -> None:
    make().add(source, tier="hdd")
    fewer = {name: directories[name] for name in ("nvme", "ssd")}
    with pytest.raises(gpunvme.TierError, match="1 files are on tier 'hdd'"):
        make(tiers=fewer)
    make().remove("source")
    assert make(tiers=fewer).tiers == ("nvme", "ssd")


def test_after_closing(tiers: Tiers, source: Path) -> None:
    tiers.add(source)
    opened = tiers.open("source")
    tiers.close()
    tiers.close()
    assert opened.read().numpy().tobytes() == b"content"
    opened.close()
    for call in (tiers.status, tiers.balance, tiers.start, lambda: tiers.open("source"), lambda: tiers.add(source)):
        with pytest.raises(ValueError, match="closed"):
            call()
