"""Safetensors files for tests, valid and spoiled ones. What is right is what the safetensors library says."""

from __future__ import annotations

import json
import random
from typing import Any

DTYPE_BITS = {
    "BOOL": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32,
    "C64": 64, "F64": 64, "I64": 64, "U64": 64,
}  # fmt: skip

#: What is put into headers to spoil them, or to find out what they bear.
TOKENS = [
    *("null", "true", "false", "NaN", "Infinity", "-Infinity", "[]", "{}", "{", "}", "[", "]", ",", ":", '"', "\\"),
    *("0", "-0", "-1", "1", "01", "1.0", "5.", ".5", "-", "+1", "1e2", "1E+2", "1e", "0e99999", "1e-99999", "1e999"),
    *("1.7976931348623157e308", "1.7976931348623158e308", "17976931348623157000e289", "0.1e309", "9" * 309),
    *("9223372036854775807", "9223372036854775808", "18446744073709551615", "18446744073709551616", "-" + "9" * 19),
    *('"F32"', '"f32"', '""', '{"F32":null}', '{"F32":{}}', '["F32",[1],[0,4]]', '["F32",[1],[0,4],0]', "[0,4]", "[1]"),
    *('"__metadata__":null,', '"__metadata__":{},', '"__metadata__":{"a":"b","a":"c"},', '"__metadata__":{"a":1},'),
    *('"dtype":"F32",', '"shape":[1],', '"data_offsets":[0,4],', '"extra":[1,{"a":null}],', '"a":{},'),
    *('"\\ud800"', '"\\ud83d\\ude00"', '"\\ude00\\ud83d"', '"\\ud83dx"', '"\\/"', '"\\x"', '"\\u12"', '"\\u00e9"'),
    *('"\\u005f"', '"\\\\ud800"', '"\\u0000"', "\ufeff", "\u00e9", "\u2028", "\0", "\x1f", "\x7f"),
    *(" ", "\n", "\t\r", "\x0b"),
    *("[" * depth + "]" * depth for depth in (120, 123, 124, 125, 126, 127, 128, 200, 100_000)),
    *('{"a":' * depth + "0" + "}" * depth for depth in (124, 125, 126, 127)),
    "[" * 100_000,
]  # fmt: skip

_SHAPES = [(), (0,), (1,), (2,), (3,), (2, 4), (0, 3), (4, 0), (1, 1, 2), (8,), (5, 2), (2**63, 0), (0, 2**64 - 1)]


def pack(header: str | bytes, body: bytes = b"") -> bytes:
    """A file of this header and these tensor bytes."""
    raw = header if isinstance(header, bytes) else header.encode("utf-8", "surrogatepass")
    return len(raw).to_bytes(8, "little") + raw + body


def tensor(dtype: str, shape: tuple[int, ...], begin: int = 0) -> dict[str, Any]:
    """The header's entry for a tensor at ``begin``."""
    elements = 1
    for size in shape:
        elements *= size
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, begin + elements * DTYPE_BITS[dtype] // 8]}


def random_header(rng: random.Random) -> dict[str, Any]:
    """A header that is mostly valid, of up to five tensors."""
    header: dict[str, Any] = {}
    if rng.random() < 0.3:
        header["__metadata__"] = rng.choice([None, {}, {"format": "pt"}, {"a": "1", "b": "\u00e9"}])
    begin = 0
    for number in range(rng.randrange(6)):
        entry = tensor(rng.choice(list(DTYPE_BITS)), rng.choice(_SHAPES), begin)
        begin = entry["data_offsets"][1]
        if rng.random() < 0.1:
            entry[rng.choice(["extra", "Dtype", ""])] = rng.choice([None, 1.5, [1, {"x": []}], "text"])
        if rng.random() < 0.1:
            entry = dict(sorted(entry.items(), reverse=rng.random() < 0.5))
        header[rng.choice(["weight", "bias", "x", "\u00e9", "", 'q"\\', "a.b"]) + str(number)] = entry
    items = list(header.items())
    if rng.random() < 0.3:
        rng.shuffle(items)
    return dict(items)


def data_bytes(header: dict[str, Any]) -> int:
    """Where the last tensor of a header ends."""
    return max((entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"), default=0)


def _respell(rng: random.Random, header: dict[str, Any]) -> str:
    """The header as JSON, spelled in one of the many ways that JSON has."""
    separators = rng.choice([(",", ":"), (", ", ": "), (" ,\n", "\t:\r")])
    text = json.dumps(header, ensure_ascii=rng.random() < 0.5, separators=separators)
    return rng.choice(["", " ", "\n"]) + text + " " * rng.choice([0, 0, 1, 7])


def _replace_value(rng: random.Random, header: dict[str, Any]) -> None:
    """Change one field of one tensor to something close by."""
    names = [name for name in header if name != "__metadata__"]
    if not names:
        return
    entry = header[rng.choice(names)]
    field = rng.choice(["dtype", "shape", "data_offsets"])
    near = [-1, 0, 1, 2, 4, 8, 2**32, 2**63, 2**64 - 1, 2**64, 1.0, True, None, "1", [], [1]]
    if field == "dtype":
        entry[field] = rng.choice(
            [*DTYPE_BITS, "F128", "float32", None, 3, [], {"F32": None}, {"F32": None, "U8": None}]
        )
        return
    values = entry[field] if isinstance(entry[field], list) else []
    if values and rng.random() < 0.8:
        position = rng.randrange(len(values))
        old = values[position] if isinstance(values[position], int) else 0
        values[position] = rng.choice([*near, old + 1, old - 1, old * 2])
    else:
        entry[field] = rng.choice([*near, [*values, 1], values[:-1]])


def spoiled(rng: random.Random, real: str = "") -> bytes:
    """A file that is valid, nearly valid or not at all. ``real`` is a real header's text, to begin with at times."""
    header = json.loads(real) if real and rng.random() < 0.1 else random_header(rng)
    end = data_bytes(header)
    for _ in range(rng.choice([0, 0, 1, 2])):
        _replace_value(rng, header)
    text = _respell(rng, header)
    for _ in range(rng.choice([0, 0, 1, 1, 2, 4])):
        text = _edit(rng, text)
    raw = text.encode("utf-8", "surrogatepass")
    if rng.random() < 0.1:
        at = rng.randrange(len(raw) + 1)
        raw = raw[:at] + rng.choice([b"\xff", b"\xc3", b"\xed\xa0\x80", b"\xc0\x80", b"\xf4\x90\x80\x80"]) + raw[at:]
    body = rng.randbytes(max(0, min(end, 4096) + (rng.choice([-1, 1, 8]) if rng.random() < 0.1 else 0)))
    data = pack(raw, body)
    if rng.random() < 0.1:
        data = _reframe(rng, data)
    return data


def _edit(rng: random.Random, text: str) -> str:
    first = rng.randrange(len(text) + 1)
    last = min(len(text), first + rng.choice([1, 1, 2, 5, 20]))
    what = rng.randrange(5)
    if what == 0:
        return text[:first] + rng.choice(TOKENS) + text[first:]
    if what == 1:
        return text[:first] + text[last:]
    if what == 2:
        return text[:last] + text[first:]
    if what == 3:
        return text[:first] + rng.choice(TOKENS) + text[last:]
    # Insert after a separator, where a value or a pair stands a chance to be in its place.
    places = [at + 1 for at, char in enumerate(text) if char in "{[,:"] or [0]
    at = rng.choice(places)
    return text[:at] + rng.choice(TOKENS) + text[at:]


def _reframe(rng: random.Random, data: bytes) -> bytes:
    what = rng.randrange(4)
    if what == 0:
        return data[: rng.randrange(len(data) + 1)]
    if what == 1:
        length = rng.choice([0, 1, 7, 8, len(data), 100_000_000, 100_000_001, 2**63, 2**64 - 1, 2**64 - 8])
        return length.to_bytes(8, "little") + data[8:]
    if what == 2:
        length = int.from_bytes(data[:8], "little") + rng.choice([-2, -1, 1, 2])
        return max(0, length).to_bytes(8, "little") + data[8:]
    return data + rng.choice([b"\0", b" ", b"\0" * 8])
