"""``gpunvme tier``: files on tiers of storage, looked at, added, moved and removed."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gpunvme.cli.output import Output, size

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table

    from gpunvme.tiers import Decision, Status, TierManager

ENVIRONMENT = "GPUNVME_TIERS"

Tiers = Annotated[
    list[str] | None,
    typer.Option(
        "--tier",
        "-t",
        metavar="NAME=DIRECTORY",
        help=f"A tier, fastest first; once for each. If none: ${ENVIRONMENT}, such as nvme=/mnt/nvme:hdd=/mnt/hdd.",
        show_default=False,
    ),
]
StateFile = Annotated[
    str | None,
    typer.Option("--state", metavar="FILE", help="The database, if it is not on the first tier.", show_default=False),
]
Rate = Annotated[
    str | None,
    typer.Option("--rate", metavar="SIZE", help="Copy at most so much a second, such as 200MiB.", show_default=False),
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Name = Annotated[str, typer.Argument(help="The file's name on the tiers.", show_default=False)]


def status(tier: Tiers = None, state: StateFile = None, json: Json = False) -> None:
    """Show what is where, and how hot it is."""
    output = Output(as_json=json)
    with _opened(tier, state) as tiers:
        now = tiers.status()
    output.document(_document(now))
    output.console.print(_shown(now))


def add(
    file: Annotated[str, typer.Argument(help="The file.", show_default=False)],
    name: Annotated[str | None, typer.Option(help="What it is called on the tiers.", show_default=False)] = None,
    to: Annotated[str | None, typer.Option(help="The tier; the fastest with room if none.", show_default=False)] = None,
    move: Annotated[bool, typer.Option("--move", help="Remove FILE when its copy is safe.")] = False,
    replace: Annotated[bool, typer.Option("--replace", help="Replace the file of that name.")] = False,
    tier: Tiers = None,
    state: StateFile = None,
    json: Json = False,
) -> None:
    """Copy a file to a tier; one that lies there already stays where it is."""
    output = Output(as_json=json)
    with _opened(tier, state) as tiers, output.status(f"adding {file}"):
        _check_tier(tiers, to)
        chosen = tiers.add(file, name, tier=to, move=move, replace=replace)
    output.document({"file": file, "tier": chosen})
    output.line(f"{name or os.path.basename(file)} is on {chosen}")


def rm(name: Name, tier: Tiers = None, state: StateFile = None, json: Json = False) -> None:
    """Remove a file from its tier."""
    output = Output(as_json=json)
    with _opened(tier, state) as tiers:
        tiers.remove(name)
    output.document({"name": name, "removed": True})
    output.line(f"{name} is removed")


def migrate(
    name: Annotated[str | None, typer.Argument(help="The file; all of them if none.", show_default=False)] = None,
    to: Annotated[
        str | None, typer.Argument(metavar="[TIER]", help="Where to; by its accesses if none.", show_default=False)
    ] = None,
    rate: Rate = None,
    tier: Tiers = None,
    state: StateFile = None,
    json: Json = False,
) -> None:
    """Move a file to a tier, or files to where they belong by their accesses."""
    from gpunvme.tiers import Decision

    output = Output(as_json=json)
    decisions: list[Decision]
    with _opened(tier, state) as tiers, output.status("migrating"):
        _check_tier(tiers, to)
        if name is None:
            decisions = tiers.balance(rate=_size(rate), moves=max(1, len(tiers.status().files)))
        elif to is None:
            decisions = [tiers.auto_tier(name)]
        else:
            source = next((file.tier for file in tiers.status().files if file.name == name), to)
            tiers.migrate(name, to, rate=_size(rate))
            decisions = [Decision(name, source, to, "as told")]
    output.document({"files": [_decision(each) for each in decisions]})
    for each in decisions:
        output.line(str(each))
    if not decisions:
        output.line("every file is where it belongs")


def pin(
    name: Name,
    to: Annotated[
        str | None, typer.Argument(metavar="[TIER]", help="Where; where it is if none.", show_default=False)
    ] = None,
    tier: Tiers = None,
    state: StateFile = None,
    json: Json = False,
) -> None:
    """Keep a file on a tier."""
    output = Output(as_json=json)
    with _opened(tier, state) as tiers:
        _check_tier(tiers, to)
        tiers.pin(name, to)
        where = next(file.tier for file in tiers.status().files if file.name == name)
    output.document({"name": name, "tier": where, "pinned": True})
    output.line(f"{name} stays on {where}")


def unpin(name: Name, tier: Tiers = None, state: StateFile = None, json: Json = False) -> None:
    """Let a file move again."""
    output = Output(as_json=json)
    with _opened(tier, state) as tiers:
        tiers.unpin(name)
    output.document({"name": name, "pinned": False})
    output.line(f"{name} may move")


def capacity(
    of: Annotated[str, typer.Argument(metavar="TIER", help="The tier.", show_default=False)],
    most: Annotated[str, typer.Argument(metavar="SIZE", help="Such as 500GiB, or none.", show_default=False)],
    tier: Tiers = None,
    state: StateFile = None,
    json: Json = False,
) -> None:
    """Set how much files may take on a tier."""
    output = Output(as_json=json)
    nbytes = None if most == "none" else _size(most)
    with _opened(tier, state, {of: nbytes}):
        pass
    output.document({"tier": of, "capacity": nbytes})
    output.line(f"{of} may hold {'any number of bytes' if nbytes is None else size(nbytes)}")


def rebuild(tier: Tiers = None, state: StateFile = None, json: Json = False) -> None:
    """Make a new database from what is on the tiers; the old one is kept aside.

    Reads every file. Counted accesses, pins and capacities are lost.
    """
    from dataclasses import asdict

    from gpunvme import tiers

    output = Output(as_json=json)
    with output.status("reading every file"):
        done = tiers.rebuild(_tiers(tier), state=state)
    output.document(asdict(done))
    output.line(f"{len(done.files)} files are on record")
    for title, names in (
        ("equal copy removed", done.doubles),
        ("differs between tiers, left alone", done.conflicts),
        ("cannot be a name, left alone", done.refused),
    ):
        for name in names:
            output.line(f"{title}: {name}", "yellow")
    if done.aside is not None:
        output.line(f"the old database is {done.aside}")


def watch(
    interval: Annotated[float, typer.Option(min=0.1, help="Seconds between looks.")] = 2.0,
    count: Annotated[int, typer.Option(min=0, help="End after so many looks; 0: never.")] = 0,
    work: Annotated[bool, typer.Option("--work", help="Also move files to where they belong.")] = False,
    rate: Rate = None,
    tier: Tiers = None,
    state: StateFile = None,
    json: Annotated[bool, typer.Option("--json", help="Print one line of JSON for each look.")] = False,
) -> None:
    """Show the tiers again and again, and with --work do the background work meanwhile."""
    import json as documents

    from rich.live import Live

    output = Output(as_json=json)
    with _opened(tier, state, rate=_size(rate), interval=interval) as tiers:
        if work:
            tiers.start()
        live = None if json or not output.console.is_terminal else Live(console=output.console, screen=False)
        with live or output.status(""):
            looks = 0
            while True:
                now = tiers.status()
                if json:
                    print(documents.dumps(_document(now)), flush=True)
                elif live is not None:
                    live.update(_shown(now), refresh=True)
                else:
                    output.console.print(_shown(now))
                looks += 1
                if looks == count:
                    break
                time.sleep(interval)


def _tiers(given: list[str] | None) -> dict[str, str]:
    texts = given or list(filter(None, os.environ.get(ENVIRONMENT, "").split(os.pathsep)))
    if not texts:
        raise typer.BadParameter(f"name the tiers: -t nvme=/mnt/nvme -t hdd=/mnt/hdd, or ${ENVIRONMENT}")
    tiers: dict[str, str] = {}
    for text in texts:
        name, equals, directory = text.partition("=")
        if not (name and equals and directory):
            raise typer.BadParameter(f"{text!r}: write NAME=DIRECTORY")
        if name in tiers:
            raise typer.BadParameter(f"tier {name!r} is named twice")
        tiers[name] = directory
    return tiers


def _opened(
    given: list[str] | None, state: str | None, capacity: dict[str, int | None] | None = None, **options: Any
) -> TierManager:
    from gpunvme.errors import Error
    from gpunvme.tiers import TierManager

    try:
        return TierManager(_tiers(given), state=state, capacity=capacity, **options)
    except ValueError as error:
        if isinstance(error, Error):
            raise
        raise typer.BadParameter(str(error)) from error


def _check_tier(tiers: TierManager, name: str | None) -> None:
    if name is not None and name not in tiers.tiers:
        raise typer.BadParameter(f"{name!r} is not a tier: {', '.join(tiers.tiers)}")


def _size(text: str | None) -> int | None:
    from gpunvme.nvme.uri import parse_size

    if text is None:
        return None
    try:
        nbytes = parse_size(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    if nbytes == 0:
        raise typer.BadParameter(f"{text!r}: more than nothing")
    return nbytes


def _decision(decision: Decision) -> dict[str, Any]:
    return {
        "name": decision.name,
        "from": decision.source,
        "to": decision.destination,
        "moved": decision.moved,
        "reason": decision.reason,
    }


def _document(status: Status) -> dict[str, Any]:
    from dataclasses import asdict

    return asdict(status)


_COLOURS = {"hot": "red", "warm": "yellow", "cold": "blue"}


def _shown(status: Status) -> Group:
    from rich.console import Group
    from rich.text import Text

    parts: list[Table | Text] = [_tier_table(status), _file_table(status)]
    parts += [Text(f"! {trouble}", style="yellow") for trouble in status.troubles]
    return Group(*parts)


def _table(*columns: tuple[str, bool]) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for title, number in columns:
        table.add_column(title, justify="right" if number else "left", overflow="fold")
    return table


def _tier_table(status: Status) -> Table:
    from rich.text import Text

    table = _table(("tier", False), ("files", True), ("used", True), ("may hold", True), ("free", True), ("", False))
    for tier in status.tiers:
        table.add_row(
            Text(tier.name, style="bold"),
            str(tier.files),
            size(tier.nbytes),
            "–" if tier.capacity is None else size(tier.capacity),
            "–" if tier.free is None else size(tier.free),
            Text(tier.trouble, style="yellow") if tier.trouble else Text(tier.directory, style="dim"),
        )
    return table


def _file_table(status: Status) -> Table:
    from rich.text import Text

    table = _table(("file", False), ("tier", False), ("size", True), ("accesses", True), ("", False), ("", False))
    for file in status.files:
        notes = ["pinned"] * file.pinned + [f"→ {file.moving_to}"] * (file.moving_to is not None)
        table.add_row(
            Text(file.name),
            Text(file.tier),
            size(file.nbytes),
            str(file.accesses),
            Text(file.temperature, style=_COLOURS[file.temperature]),
            Text(", ".join(notes)),
        )
    return table
