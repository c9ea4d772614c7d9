"""Paths that exist in the field and that this release has no code for.

They stand in `explain()`'s table so that nobody has to guess whether one of them was tried.
"""

from __future__ import annotations

from gpunvme.paths.base import Verdict

_WHY = "this release of gpunvme has no code for it"

ABSENT: tuple[Verdict, ...] = tuple(
    Verdict(name, False, _WHY) for name in ("cufile/nvidia-fs", "cufile/p2pdma", "cufile/compat", "p2pdma")
)
