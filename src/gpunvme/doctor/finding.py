"""What a check found: how bad it is, the fact, what it costs, and the exact fix."""

from __future__ import annotations

import enum
from dataclasses import dataclass


class Level(enum.Enum):
    """How much a finding matters."""

    GREEN = "green"
    """Nothing is lost."""
    YELLOW = "yellow"
    """It works, and something is lost."""
    RED = "red"
    """Something that this machine ought to be able to do does not work."""


@dataclass(frozen=True)
class Finding:
    """One line of ``gpunvme doctor``.

    Parameters
    ----------
    level
        How much it matters.
    topic
        What was looked at, in one or two words.
    fact
        What was seen.
    cost
        What it costs the user; empty if nothing.
    fix
        What the user can type or change; shown, never executed. Empty if there is nothing to do.
    """

    level: Level
    topic: str
    fact: str
    cost: str = ""
    fix: str = ""

    def as_dict(self) -> dict[str, str]:
        """Return the finding as plain strings, for JSON."""
        return {
            "level": self.level.value,
            "topic": self.topic,
            "fact": self.fact,
            "cost": self.cost,
            "fix": self.fix,
        }
