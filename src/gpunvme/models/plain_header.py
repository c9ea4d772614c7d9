"""Headers as the safetensors library and Python's json write them, several times faster than by a JSON parser.

One regular expression takes all tensors at once. What it does not know, down to a space, is left to `header`, which
takes everything that the format allows and says what is wrong with the rest.
"""

from __future__ import annotations

import json
import re
from itertools import chain

from gpunvme.models.dtypes import DTYPES, Dtype

Entry = tuple[Dtype, tuple[int, ...], tuple[int, int]]

_NUMBER = r"(?:0|[1-9][0-9]{0,17})"
_NAME = r'[^"\\\x00-\x1f]*'


class _Spelling:
    """One way to write a header: what stands between its parts."""

    def __init__(self, colon: str, comma: str) -> None:
        self.comma = comma
        self.metadata = re.compile(
            rf'{{"__metadata__"{colon}({{(?:"{_NAME}"{colon}"{_NAME}"(?:{comma})?)*}}){comma}(?=")'
        )
        self.tensor = re.compile(
            rf'"({_NAME})"{colon}{{"dtype"{colon}"([A-Z0-9_]+)"{comma}"shape"{colon}'
            rf"\[((?:{_NUMBER}(?:{comma}{_NUMBER})*)?)\]{comma}"
            rf'"data_offsets"{colon}\[({_NUMBER}){comma}({_NUMBER})\]}}({comma}|}} *)'
        )
        # Characters of a tensor that are in no group.
        self.fixed = len(f'""{colon}{{"dtype"{colon}""{comma}"shape"{colon}[]{comma}"data_offsets"{colon}[{comma}]}}')


_LIBRARYS = _Spelling(":", ",")
_PYTHONS = _Spelling(": ", ", ")


def plain_entries(text: str) -> tuple[dict[str, Entry], dict[str, str] | None] | None:
    """Read a header in a plain form: entries ordered by offset, and the metadata; None for any other."""
    if not text.startswith('{"'):
        return None
    spelling = _PYTHONS if text.startswith('": ', text.find('"', 2)) else _LIBRARYS
    metadata: dict[str, str] | None = None
    position = 1
    match = spelling.metadata.match(text)
    if match is not None:
        try:
            metadata = dict(json.loads(match.group(1)))
        except json.JSONDecodeError:
            return None
        position = match.end()
    if spelling.tensor.match(text, position) is None:  # or the whole header would be searched
        return None
    found = spelling.tensor.findall(text, position)
    # Nothing lies between them if together they are as long as the text.
    if len(text) - position != len(found) * spelling.fixed + sum(map(len, chain.from_iterable(found))):
        return None
    if found[-1][5] == spelling.comma or any(one[5] != spelling.comma for one in found[:-1]):
        return None
    tensors: dict[str, Entry] = {}
    shapes: dict[str, tuple[int, ...]] = {"": ()}
    for name, dtype, dimensions, begin, stop, _ in found:
        kind, shape = DTYPES.get(dtype), shapes.get(dimensions)
        if kind is None or name == "__metadata__":
            return None
        if shape is None:
            shape = shapes[dimensions] = tuple(map(int, dimensions.split(",")))
        tensors[name] = (kind, shape, (int(begin), int(stop)))
    return dict(sorted(tensors.items(), key=lambda item: item[1][2])), metadata
