"""The command line: ``gpunvme demo | load | copy | info | bench | doctor``."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Parameters
    ----------
    arguments
        What follows the program's name; those of this process if None.

    Returns
    -------
    int
        The exit status; see `gpunvme.cli.exits.Exit`.
    """
    from gpunvme.cli.app import run

    return run(arguments)
