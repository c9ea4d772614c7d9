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


_LOOK_AGAIN = "make what is named readable to this process (sudo, or outside of the container), and look again"


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
    commands
        What to type for it, a shell command each, where typing is enough; never executed by us either.
    """

    level: Level
    topic: str
    fact: str
    cost: str = ""
    fix: str = ""
    commands: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, object]:
        """Return the finding as plain strings and lists of them, for JSON."""
        return {
            "level": self.level.value,
            "topic": self.topic,
            "fact": self.fact,
            "cost": self.cost,
            "fix": self.fix,
            "commands": list(self.commands),
        }


def unknown(topic: str, fact: str, why: str, fix: str = _LOOK_AGAIN) -> Finding:
    """Return the line of something that cannot be told: never green, for it may cost something.

    Parameters
    ----------
    topic
        What was looked at.
    fact
        What is not known.
    why
        Why not.
    fix
        What would let it be told.
    """
    return Finding(
        Level.YELLOW,
        topic,
        f"{fact}: unknown, {why}",
        cost="what this line would find stays hidden",
        fix=fix,
    )
