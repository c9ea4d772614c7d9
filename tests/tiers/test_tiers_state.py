"""The database: damaged, foreign, newer or gone, it is an error that says how to go on, and nothing is lost."""

from __future__ import annotations

import os
import random
import shutil
import sqlite3
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from on_tiers import Tiers, on_disk

import gpunvme
from gpunvme import tiers as tiers_module
from gpunvme.tiers.state import APPLICATION_ID

if TYPE_CHECKING:
    from collections.abc import Callable


@pytest.fixture
def database(make: Callable[..., Tiers], source: Path, directories: dict[str, Path]) -> Path:
    """Of tiers with two files, closed."""
    with make() as tiers:
        tiers.add(source, "deep/x", tier="ssd")
        tiers.add(source, "y", tier="hdd")
    return directories["nvme"] / ".gpunvme-tier" / "state.sqlite"


def rebuilt(directories: dict[str, Path]) -> tiers_module.Rebuilt:
    done = tiers_module.rebuild(directories)
    with Tiers(directories) as tiers:
        assert {file.name for file in tiers.status().files} == set(done.files)
        for name in done.files:
            assert tiers.migrate(name, "nvme")
            tiers.read(name)
    return done


@pytest.mark.parametrize("damage", ["text", "empty", "header", "pages", "cut"])
def test_a_damaged_database_is_told_and_made_anew(
    database: Path, directories: dict[str, Path], make: Callable[..., Tiers], damage: str
) -> None:
    data = bytearray(database.read_bytes())
    changed = {
        "text": b"not a database at all\n" * 100,
        "empty": b"",
        "header": b"\xff" * 100 + data[100:],
        "pages": data[:100] + b"\xff" * (len(data) - 100),
        "cut": data[: len(data) // 2],
    }[damage]
    database.write_bytes(changed)
    before = on_disk(directories)
    with pytest.raises(gpunvme.TierStateError, match=r"rebuild|another program"):
        make()
    assert on_disk(directories) == before
    done = rebuilt(directories)
    assert set(done.files) == {"deep/x", "y"}
    assert done.aside is not None
    assert Path(done.aside).read_bytes() == changed


def test_any_damage_is_an_error_of_ours_or_harmless(
    database: Path, directories: dict[str, Path], make: Callable[..., Tiers]
) -> None:
    data, chance = database.read_bytes(), random.Random(5)
    refused = 0
    for _ in range(60):
        broken = bytearray(data)
        for _ in range(chance.choice([1, 4, 64])):
            broken[chance.randrange(len(broken))] = chance.randrange(256)
        database.write_bytes(broken)
        try:
            with Tiers(directories) as tiers:
                for file in tiers.status().files:
                    tiers.open(file.name).close()
        except gpunvme.Error:
            refused += 1
        for suffix in ("-wal", "-shm"):
            Path(f"{database}{suffix}").unlink(missing_ok=True)
    assert refused
    assert on_disk(directories) == {"ssd/deep/x": b"content", "hdd/y": b"content"}


def test_a_foreign_database_is_left_alone(
    directories: dict[str, Path], make: Callable[..., Tiers], tmp_path: Path
) -> None:
    foreign = tmp_path / "foreign.sqlite"
    connection = sqlite3.connect(foreign)
    connection.executescript("CREATE TABLE precious (x); INSERT INTO precious VALUES (1)")
    connection.close()
    before = foreign.read_bytes()
    with pytest.raises(gpunvme.TierStateError, match="another program's"):
        make(state=foreign)
    assert foreign.read_bytes() == before
    assert on_disk(directories) == {}


def test_a_newer_version_is_refused(database: Path, make: Callable[..., Tiers]) -> None:
    connection = sqlite3.connect(database)
    assert connection.execute("PRAGMA application_id").fetchone() == (APPLICATION_ID,)
    connection.execute("PRAGMA user_version = 2")
    connection.close()
    with pytest.raises(gpunvme.TierStateError, match="has version 2; this release knows 1"):
        make()


def test_a_lost_database_is_not_begun_anew(
    database: Path, make: Callable[..., Tiers], directories: dict[str, Path]
) -> None:
    """The disk with the database may only be not mounted: an empty record would look as if all files were lost."""
    database.unlink()
    with pytest.raises(gpunvme.TierStateError, match="has a record, but not at"):
        make()
    assert set(rebuilt(directories).files) == {"deep/x", "y"}


def test_rebuilding_finds_doubles_and_conflicts_and_loses_neither(
    database: Path, directories: dict[str, Path], make: Callable[..., Tiers]
) -> None:
    (directories["hdd"] / "deep").mkdir()
    (directories["hdd"] / "deep" / "x").write_bytes(b"content")
    (directories["nvme"] / "y").write_bytes(b"another")
    (directories["nvme"] / "a\nb").write_bytes(b"name")
    (directories["nvme"] / "link").symlink_to("/etc/passwd")
    (directories["nvme"] / ".gpunvme-tier" / "incoming" / "left").write_bytes(b"half")
    done = tiers_module.rebuild(directories)
    assert done.files == ("deep/x",)
    assert done.doubles == ("deep/x",)
    assert done.conflicts == ("y",)
    assert done.refused == (str(directories["nvme"] / "a\nb"),)
    assert on_disk({name: directories[name] for name in ("ssd", "hdd")}) == {
        "ssd/deep/x": b"content",
        "hdd/y": b"content",
    }
    assert (directories["nvme"] / "y").read_bytes() == b"another"
    assert make().tier_of("deep/x") == "ssd"


def test_rebuilding_waits_for_nobody_and_needs_every_tier(
    database: Path, directories: dict[str, Path], make: Callable[..., Tiers]
) -> None:
    tiers = make()
    with pytest.raises(gpunvme.TierError, match="in use"):
        tiers_module.rebuild(directories)
    tiers.close()
    moved = directories["hdd"].rename(directories["hdd"].parent / "away")
    with pytest.raises(gpunvme.TierUnavailableError):
        tiers_module.rebuild(directories)
    assert database.exists()
    moved.rename(directories["hdd"])
    (directories["hdd"] / ".gpunvme-tier" / "tier.json").write_bytes(b"{}")
    with pytest.raises(gpunvme.TierStateError, match="damaged"):
        make()
    assert set(rebuilt(directories).files) == {"deep/x", "y"}


def test_the_database_may_lie_elsewhere(make: Callable[..., Tiers], source: Path, directories: dict[str, Path]) -> None:
    elsewhere = source.parent / "state with ? and % and #.sqlite"
    with make(state=elsewhere) as tiers:
        tiers.add(source)
    shutil.rmtree(directories["nvme"])
    with make(state=elsewhere) as tiers:
        assert "cannot be reached" in tiers.status().tiers[0].trouble
        with pytest.raises(gpunvme.TierUnavailableError):
            tiers.open("source")


def test_a_directory_may_move(make: Callable[..., Tiers], source: Path, directories: dict[str, Path]) -> None:
    with make() as tiers:
        tiers.add(source, tier="hdd")
    moved = directories["hdd"].rename(directories["hdd"].parent / "other-mount")
    assert make(tiers={**directories, "hdd": moved}).read("source") == b"content"


def test_a_database_that_cannot_be_written(make: Callable[..., Tiers], source: Path, database: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may write everywhere")
    database.chmod(0o400)
    with pytest.raises(gpunvme.TierError, match="cannot be used"):
        make().add(source)
