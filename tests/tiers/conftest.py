"""Three tiers in directories of their own, and a file to add."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from on_tiers import NAMES, Tiers

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


@pytest.fixture
def directories(tmp_path: Path) -> dict[str, Path]:
    for name in NAMES:
        (tmp_path / name).mkdir()
    return {name: tmp_path / name for name in NAMES}


@pytest.fixture
def make(directories: dict[str, Path]) -> Iterator[Callable[..., Tiers]]:
    made: list[Tiers] = []

    def build(**options: Any) -> Tiers:
        made.append(Tiers(options.pop("tiers", directories), **options))
        return made[-1]

    yield build
    for tiers in made:
        tiers.close()


@pytest.fixture
def tiers(make: Callable[..., Tiers]) -> Tiers:
    return make()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "source"
    path.write_bytes(b"content")
    return path
