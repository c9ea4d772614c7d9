"""Which layers stay in memory under a budget, and how large the slots for the others are."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from gpunvme.errors import BudgetError


class Residency(NamedTuple):
    """Which layers stay, and the bytes of each slot for the others (0: all stay)."""

    stay: frozenset[int]
    slot_bytes: int


def plan(sizes: Sequence[int], slots: int, budget: int | None, what: str) -> Residency:
    """Choose the layers that stay in a device's memory.

    As many bytes as possible stay; large layers first if that makes the slots smaller by more than it costs, and the
    rest evenly spread over a pass, so that reading has the computation of the layers between to itself.

    Parameters
    ----------
    sizes
        Bytes of each layer in a slot.
    slots
        How many slots the layers that do not stay need.
    budget
        Bytes for slots and layers together; None for the slots alone.
    what
        What the budget is called, for the error.

    Raises
    ------
    BudgetError
        The slots alone take more.
    """
    largest = max(sizes, default=0)
    if budget is None:
        return Residency(frozenset(), largest)
    if sum(sizes) <= budget:
        return Residency(frozenset(range(len(sizes))), 0)
    best: Residency | None = None
    most = -1
    smallest_need = 0
    for slot in sorted(set(sizes), reverse=True):
        forced = [number for number, size in enumerate(sizes) if size > slot]
        need = slots * slot + sum(sizes[number] for number in forced)
        smallest_need = need if not smallest_need else min(smallest_need, need)
        if need > budget:
            continue
        others = [number for number, size in enumerate(sizes) if 0 < size <= slot]
        stay = frozenset(forced) | spread(others, sizes, budget - need)
        kept = sum(sizes[number] for number in stay)
        if kept > most:
            best, most = Residency(stay, slot), kept
    if best is None:
        raise BudgetError(
            f"{what}={budget} is too small: {slots} slots for the largest layers take {smallest_need} bytes at least"
        )
    return best


def spread(numbers: Sequence[int], sizes: Sequence[int], room: int) -> frozenset[int]:
    """Choose layers that fit into ``room`` bytes together, as evenly spread as they can be."""
    count = _most(numbers, sizes, room)
    chosen = {numbers[(2 * place + 1) * len(numbers) // (2 * count)] for place in range(count)}
    room -= sum(sizes[number] for number in chosen)
    for number in numbers:  # what sizes of their own kind left over
        if number not in chosen and sizes[number] <= room:
            chosen.add(number)
            room -= sizes[number]
    return frozenset(chosen)


def _most(numbers: Sequence[int], sizes: Sequence[int], room: int) -> int:
    """The largest count of evenly spread layers, found by halving, that fits."""
    low, high = 0, len(numbers)
    while low < high:
        middle = (low + high + 1) // 2
        places: Iterable[int] = range(middle)
        if sum(sizes[numbers[(2 * place + 1) * len(numbers) // (2 * middle)]] for place in places) <= room:
            low = middle
        else:
            high = middle - 1
    return low
