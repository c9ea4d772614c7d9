"""Paths that exist in the field and that this release has no code for.

They stand in `explain()`'s table so that nobody has to guess whether one of them was tried.
"""

from __future__ import annotations

from gpunvme.paths.base import Verdict

ABSENT: tuple[Verdict, ...] = (Verdict("p2pdma", False, "this release of gpunvme has no code for it"),)
