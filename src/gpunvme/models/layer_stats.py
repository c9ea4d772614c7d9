"""What a `LayerLoader` has done: counted where it was done, and reported by the transfers themselves."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from gpunvme.models.layer_layout import LayerLayout
from gpunvme.transfer import Transfer, format_bytes, format_seconds


@dataclass
class LayerStats:
    """What a loader has done so far.

    Attributes
    ----------
    layers
        Layers handed out.
    hits
        How many of them were where: ``"device"`` (stayed in the device's memory, or still in a slot), ``"host"``
        (copied from page-locked host memory), ``"source"`` (read).
    read_bytes
        Bytes read from the source for layers that were handed out or that stay.
    copied_bytes
        Bytes copied from page-locked host memory.
    waited_seconds
        Time that the consumer waited for layers, in seconds.
    paths
        Bytes of each source by the path that carried them, as the transfers report it.
    reasons
        How the latest bytes of each source travelled.
    """

    layers: int = 0
    hits: Counter[str] = field(default_factory=Counter)
    read_bytes: int = 0
    copied_bytes: int = 0
    waited_seconds: float = 0.0
    paths: dict[str, Counter[str]] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        where = ", ".join(f"{count} {tier}" for tier, count in sorted(self.hits.items()))
        ways = sorted({path for paths in self.paths.values() for path in paths})
        return (
            f"{self.layers} layers ({where}); {format_bytes(self.read_bytes)} read by {', '.join(ways) or 'nothing'}, "
            f"{format_bytes(self.copied_bytes)} copied from host memory; "
            f"waited {format_seconds(self.waited_seconds)}"
        )

    def add(self, layer: LayerLayout, transfer: Transfer) -> None:
        """Count a layer that was read."""
        for run in layer.runs:
            self.read_bytes += run.nbytes
            self.paths.setdefault(run.filename, Counter())[transfer.path] += run.nbytes
            self.reasons[run.filename] = transfer.reason
