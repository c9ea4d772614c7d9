"""safetensors checkpoints to GPU tensors: a few large tensors, thousands of small ones, hot and cold, peak memory.

Run it on a machine with an NVIDIA GPU and PyTorch; see README.md.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gpunvme.bench import machine, page_cache
from gpunvme.bench.contest import Contestant
from gpunvme.bench.machine import size_text
from gpunvme.bench.scratch import random_pieces
from session import GIB, MIB, Session, options, size

OURS = "gpunvme.load_file"
LIMITS = "limits"
SHARDS = 4
LOADERS: dict[str, tuple[str, dict[str, Any]]] = {
    OURS: ("ours:Checkpoints", {}),
    "safetensors load_file": ("peers:Safetensors", {}),
    "Run:ai Model Streamer": ("peers:Runai", {"threads": 16}),
    "fastsafetensors, buffered": ("peers:Fastsafetensors", {"direct": False}),
    "fastsafetensors, O_DIRECT": ("peers:Fastsafetensors", {"direct": True}),
    "InstantTensor, buffered": ("peers:Instanttensor", {"buffered": True}),
    "InstantTensor, O_DIRECT": ("peers:Instanttensor", {"buffered": False}),
}
O_DIRECT = ("fastsafetensors, O_DIRECT", "InstantTensor, O_DIRECT")
BUFFERED = ("fastsafetensors, buffered", "InstantTensor, buffered")


def main() -> None:
    parser = options(__doc__ or "", deadline=120)
    parser.add_argument("--size", type=size, default=8 * GIB, help="of the checkpoint (default: 8GiB)")
    parser.add_argument("--small", type=size, default=2 * GIB, help="of the one with small tensors (default: 2GiB)")
    arguments = parser.parse_args()
    scale = 8 if arguments.quick else 1
    with Session("gpu_checkpoints", arguments) as session:
        shard = arguments.size // SHARDS // scale
        large = [write(session, f"large-{number}", number, large_tensors(shard)) for number in range(SHARDS)]
        small = [write(session, "small", SHARDS, small_tensors(arguments.small // scale))]
        session.workers(LOADERS)
        session.workers({LIMITS: ("ours:Limits", {})}, nbytes=Path(large[0]).stat().st_size)
        # No loader can be faster whose tensors each have memory of their own.
        memory_alone = session.contestant(
            "torch.empty of every tensor, nothing read", "limit", "allocate", worker=OURS, files=small
        )
        measure(session, f"checkpoint, {size_text(shard * SHARDS)} in {SHARDS} files", large, "hot")
        measure(
            session, f"checkpoint, {size_text(arguments.small // scale)} of small tensors", small, "hot", [memory_alone]
        )
        measure(session, f"checkpoint, {size_text(shard)} in 1 file", large[:1], "cold")


def measure(
    session: Session, what: str, files: list[str], state: page_cache.State, more: Sequence[Contestant] = ()
) -> None:
    case = f"{what}, {state}"
    memory: dict[str, dict[str, Any]] = {}
    sizes = {name: Path(name).stat().st_size for name in files}
    nbytes = sum(sizes.values())
    left_out = O_DIRECT if state == "hot" else BUFFERED

    def bring() -> float | None:
        fractions = [page_cache.bring(name, state, length) for name, length in sizes.items()]
        return None if None in fractions else sum(f or 0.0 for f in fractions) / len(fractions)

    members = [*(loader(session, name, files, memory) for name in LOADERS if name not in left_out), *more]
    if state == "hot":
        members.append(
            session.contestant(
                "page-locked memory to GPU", "limit", "copy_ceiling", worker=LIMITS, nbytes=min(nbytes, 2 * GIB)
            )
        )
    else:
        members += [
            session.contestant(
                f"raw O_DIRECT into host memory, depth {depth}",
                "limit",
                "direct_read",
                worker=LIMITS,
                path=files[0],
                nbytes=nbytes,
                chunk=MIB,
                depth=depth,
            )
            for depth in (16, 64)
        ]
    rows = session.hold(case, members, bring, warm_up=state == "hot", seconds=25)
    for row in rows:
        row.update(memory.get(row["contestant"], {}))
        if "peak_bytes" in row:
            print(f"  {row['contestant']:44s} peak {row['peak_bytes'] / nbytes:.3f} × the files, PyTorch's allocator")
    ours = next(row for row in rows if row["contestant"] == OURS)
    session.target(case, "limit" if state == "hot" else "any", 0.9 if state == "hot" else 0.97)
    session.target_peak(case, ours.get("peak_bytes"), nbytes, 1.05)


def loader(session: Session, name: str, files: list[str], memory: dict[str, dict[str, Any]]) -> Contestant:
    """Let a loader take part, and keep the most memory that it took."""

    def keep(answer: dict[str, Any]) -> None:
        held = memory.setdefault(name, {"peak_bytes": 0, "device_bytes": 0})
        for key in held:
            held[key] = max(held[key], answer[key])

    kind = "ours" if name == OURS else "peer"
    return session.contestant(name, kind, "load", limit=90, on_answer=keep, files=files)


# ---- checkpoints


def large_tensors(nbytes: int) -> list[tuple[str, list[int]]]:
    """Return tensors of 64 MiB with a few vectors between them, as in a language model's layers."""
    tensors: list[tuple[str, list[int]]] = []
    for layer in range(max(1, nbytes // (64 * MIB))):
        tensors += [(f"layers.{layer}.weight", [4096, 8192]), (f"layers.{layer}.norm", [4096])]
    return tensors


def small_tensors(nbytes: int) -> list[tuple[str, list[int]]]:
    """Return thousands of tensors between 2 KiB and 1 MiB, of sizes that align with nothing."""
    tensors: list[tuple[str, list[int]]] = []
    total, number = 0, 0
    rows = (1, 3, 7, 16, 33, 64, 129, 257, 511)
    while total < nbytes:
        shape = [rows[number % len(rows)], 1021]
        tensors.append((f"experts.{number}.weight", shape))
        total += 2 * shape[0] * shape[1]
        number += 1
    return tensors


def write(session: Session, name: str, number: int, tensors: list[tuple[str, list[int]]], dtype: str = "BF16") -> str:
    """Write a safetensors file of random tensors of a type of two bytes."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor, shape in tensors:
        begin, end = end, end + 2 * functools.reduce(int.__mul__, shape)
        header[f"shard{number}.{tensor}"] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()  # as the safetensors library spells it
    text += b" " * (-len(text) % 8)
    path = session.removed_at_the_end(session.directory(end) / f"{name}.safetensors")
    if not path.exists() or path.stat().st_size != 8 + len(text) + end:
        with path.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for piece in random_pieces(end):
                file.write(piece)
    session.result["file"] = machine.describe_file(str(path))
    return str(path)


if __name__ == "__main__":
    main()
