"""What came of a step: passed, failed or skipped, why, and the figures that were seen."""

from __future__ import annotations

import enum
from dataclasses import asdict, dataclass, field
from typing import Any, Self

SCHEMA = "gpunvme.accept"
SCHEMA_VERSION = 1


class Skipped(Exception):
    """A step cannot be done on this machine; the message says what is missing."""


class Outcome(enum.Enum):
    """What became of a step."""

    PASSED = "passed"
    FAILED = "failed"
    SKIPPED = "skipped"


@dataclass(frozen=True)
class Figure:
    """A number that was seen, and what it cannot exceed here as far as that is known: no measurement to be quoted.

    ``unit`` is "GB/s", "IOPS" or "µs"; ``limit`` is in the same, and ``limit_what`` says whose it is.
    """

    what: str
    value: float
    unit: str
    limit: float | None = None
    limit_what: str = ""

    def __str__(self) -> str:
        text = f"{self.what} {_number(self.value)} {self.unit}"
        return text if self.limit is None else f"{text} ({self.limit_what} {_number(self.limit)})"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


@dataclass(frozen=True)
class Result:
    """What a step returns: what was seen, in a few words; figures; and facts for the document.

    The fact ``left`` is for later steps: the seed of what the test area holds now.
    """

    seen: str = ""
    figures: tuple[Figure, ...] = ()
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Row:
    """One line of the table. ``reason`` is what was seen, or why it failed or was skipped."""

    step: str
    what: str
    outcome: Outcome
    reason: str = ""
    seconds: float = 0.0
    figures: tuple[Figure, ...] = ()
    facts: dict[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Return it for the document."""
        return asdict(self) | {"outcome": self.outcome.value, "seconds": round(self.seconds, 3)}

    @classmethod
    def skipped(cls, step: str, what: str, reason: str) -> Self:
        """One of a step that was not begun."""
        return cls(step, what, Outcome.SKIPPED, reason)
