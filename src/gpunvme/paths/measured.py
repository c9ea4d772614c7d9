"""What paths were measured to reach, kept on disk: by GPU, drive, file system, driver and library.

A measurement costs seconds, and its result is true until one of these changes. The file is replaced as a whole; one
that cannot be understood is ignored and written anew.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpunvme.kept_files import cache_directory

_FORMAT = 1
_MOST_ENTRIES = 256


@dataclass(frozen=True, slots=True)
class Rates:
    """Bytes per second of a path: ``hot`` where the page cache has the bytes, ``cold`` where it has not.

    None: the file could not be brought into that state.
    """

    hot: float | None
    cold: float | None

    def seconds(self, hot_bytes: float, cold_bytes: float) -> float:
        """How long it would take; infinite if nothing was measured."""
        hot, cold = self.hot or self.cold, self.cold or self.hot
        if not hot or not cold:
            return math.inf
        return hot_bytes / hot + cold_bytes / cold

    def __str__(self) -> str:
        said = [f"{kind} {rate / 1e9:.2f} GB/s" for kind, rate in (("hot", self.hot), ("cold", self.cold)) if rate]
        return ", ".join(said) or "nothing"


@dataclass(frozen=True, slots=True)
class Record:
    """One measurement: paths' rates, how many bytes each of its reads had, and when it was."""

    rates: dict[str, Rates]
    nbytes: int
    when: float

    def faster(self, path: str, than: str, hot_bytes: float, cold_bytes: float) -> bool:
        """Whether one path was measured to be the faster one, for so much of each kind."""
        if path not in self.rates or than not in self.rates:
            return False
        return self.rates[path].seconds(hot_bytes, cold_bytes) < self.rates[than].seconds(hot_bytes, cold_bytes)

    def __str__(self) -> str:
        day = time.strftime("%Y-%m-%d", time.localtime(self.when))
        return f"measured {day} over {self.nbytes >> 20} MiB: " + "; ".join(
            f"{path} {rates}" for path, rates in self.rates.items()
        )


def place() -> Path:
    """File that records are kept in."""
    return cache_directory() / "paths.json"


def find(key: str) -> Record | None:
    """The record for a key, or None."""
    return _record(_entries().get(key))


def keep(key: str, record: Record) -> None:
    """Add a record, or replace it. Where nothing can be written, nothing is kept."""
    entries = {name: entry for name, entry in _entries().items() if _record(entry) is not None}
    entries[key] = {
        "rates": {path: {"hot": rates.hot, "cold": rates.cold} for path, rates in record.rates.items()},
        "nbytes": record.nbytes,
        "when": record.when,
    }
    newest = sorted(entries, key=lambda name: float(entries[name]["when"]))[-_MOST_ENTRIES:]
    text = json.dumps({"format": _FORMAT, "records": {name: entries[name] for name in newest}}, indent=1)
    target = place()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=target.parent, prefix="paths.", delete=False) as file:
            try:
                file.write(text)
                file.flush()
                os.replace(file.name, target)  # whole or not at all, whoever else writes it
            except BaseException:
                os.unlink(file.name)
                raise
    except OSError:
        pass


def _entries() -> dict[str, Any]:
    try:
        parsed = json.loads(place().read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(parsed, dict) or parsed.get("format") != _FORMAT or not isinstance(parsed.get("records"), dict):
        return {}
    records: dict[str, Any] = parsed["records"]
    return records


def _record(entry: Any) -> Record | None:
    try:
        rates = {str(path): Rates(_rate(found["hot"]), _rate(found["cold"])) for path, found in entry["rates"].items()}
        when = float(entry["when"])
        return Record(rates, int(entry["nbytes"]), when) if rates and math.isfinite(when) else None
    except (TypeError, KeyError, ValueError, AttributeError, OverflowError):
        return None


def _rate(value: Any) -> float | None:
    if value is None:
        return None
    rate = float(value)
    if not 0 < rate < math.inf:
        raise ValueError(value)
    return rate
