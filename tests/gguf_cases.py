"""GGUF files for tests, valid and spoiled ones. What is right is what the gguf package says."""

from __future__ import annotations

import random
import struct
from typing import Any

#: struct formats of metadata's scalar types
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "B", 10: "Q", 11: "q", 12: "d"}


def string(text: str | bytes) -> bytes:
    raw = text if isinstance(text, bytes) else text.encode()
    return struct.pack("<Q", len(raw)) + raw


def array(kind: int, *elements: bytes, count: int | None = None) -> bytes:
    return struct.pack("<IQ", kind, len(elements) if count is None else count) + b"".join(elements)


def pair(key: str | bytes, kind: int, value: bytes) -> bytes:
    return string(key) + struct.pack("<I", kind) + value


def tensor(name: str | bytes, shape: tuple[int, ...], kind: int, offset: int) -> bytes:
    """A description; ``shape`` as the file has it, fastest dimension first."""
    sizes = struct.pack(f"<{len(shape)}Q", *shape)
    return string(name) + struct.pack("<I", len(shape)) + sizes + struct.pack("<IQ", kind, offset)


def pack(
    pairs: tuple[bytes, ...] = (),
    tensors: tuple[bytes, ...] = (),
    data: bytes = b"",
    *,
    version: int = 3,
    alignment: int = 32,
    counts: tuple[int, int] | None = None,
) -> bytes:
    """A file of these pairs, descriptions and tensor bytes."""
    many, keys = counts or (len(tensors), len(pairs))
    head = b"GGUF" + struct.pack("<IQQ", version, many, keys) + b"".join(pairs) + b"".join(tensors)
    return head + bytes(-len(head) % alignment) + data


#: (what is wrong, the file, what is said of it)
U32 = struct.Struct("<I").pack
Q8 = 8
REFUSED: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "file ends at 0"),
    "short": (b"GGUF\3\0\0\0", "file ends at 8"),
    "another format": (b"GGML" + bytes(40), "starts with"),
    "version 1": (pack(version=1), "version 1"),
    "version 4": (pack(version=4), "version 4"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
    "more tensors than bytes": (pack(counts=(1000, 0)), "1000 tensors are more"),
    "more tensors than a limit": (pack(counts=(2**63, 0)), "tensors are more"),
    "more keys than a limit": (pack(counts=(0, 2**64 - 1)), "metadata keys are more"),
    "a key too long": (pack((struct.pack("<Q", 70_000) + bytes(70_100),)), "has 70000 bytes"),
    "a key that ends nowhere": (pack((struct.pack("<Q", 60_000) + b"a" * 40,)), "file ends at"),
    "a key that is no text": (pack((pair(b"\xff\xfe", 0, b"\0"),)), "not UTF-8"),
    "a key twice": (pack((pair("a", 0, b"\0"), pair("a", 0, b"\0"))), "key twice"),
    "an unknown type": (pack((pair("a", 13, b"\0" * 8),)), "unknown type 13"),
    "an array of an unknown type": (pack((pair("a", 9, array(13, b"\0" * 8)),)), "array of the unknown type 13"),
    "a string past the end": (pack((pair("a", 8, struct.pack("<Q", 2**64 - 1)),), counts=(0, 1)), "file ends at"),
    "an array past the end": (pack((pair("a", 9, array(12, count=2**61)),)), "file ends at"),
    "more strings than bytes": (pack((pair("a", 9, array(8, count=2**60)),)), "more than the file can hold"),
    "arrays too deep": (
        pack((pair("a", 9, array(9, array(9, array(9, array(9, array(0, b"\0")))))),)),
        "nests more than 4",
    ),
    "an alignment of 0": (pack((pair("general.alignment", 4, U32(0)),)), "power of two"),
    "an alignment of 33": (pack((pair("general.alignment", 4, U32(33)),)), "power of two"),
    "an alignment of another type": (pack((pair("general.alignment", 2, b"\x20\0"),)), "power of two"),
    "a tensor's unknown type": (pack((), (tensor("w", (4,), 4, 0),), bytes(64)), "unknown tensor type 4"),
    "too many dimensions": (pack((), (tensor("w", (1,) * 9, 0, 0),), bytes(64)), "9 dimensions"),
    "dimensions past the end": (pack((), (string("w") + U32(8),)), "file ends at"),
    "a size that overflows": (pack((), (tensor("w", (2**32, 2**32), 24, 0),), bytes(64)), "overflows"),
    "a size that overflows at 0": (pack((), (tensor("w", (2**63, 0), 24, 0),), bytes(64)), "overflows"),
    "half a block": (pack((), (tensor("w", (16, 2), Q8, 0),), bytes(64)), "no whole blocks"),
    "a scalar block": (pack((), (tensor("w", (), Q8, 0),), bytes(64)), "no whole blocks"),
    "an offset between": (pack((), (tensor("w", (4,), 0, 16),), bytes(64)), "not aligned to 32"),
    "a tensor past the end": (pack((), (tensor("w", (17,), 0, 0),), bytes(64)), "not in the file"),
    "an offset past the end": (pack((), (tensor("w", (1,), 0, 2**63),), bytes(64)), "not in the file"),
    "tensors that overlap": (
        pack((), (tensor("v", (9,), 0, 0), tensor("w", (8,), 0, 32)), bytes(64)),
        "overlaps tensor 'v'",
    ),
    "a tensor twice": (pack((), (tensor("w", (8,), 0, 0), tensor("w", (8,), 0, 32)), bytes(64)), "there twice"),
    "a name that is no text": (pack((), (tensor(b"\xc3", (8,), 0, 0),), bytes(64)), "not UTF-8"),
}

#: Numbers that are put over others.
_NUMBERS = [
    0,
    1,
    2,
    7,
    8,
    9,
    12,
    13,
    31,
    32,
    33,
    255,
    2**16,
    2**31,
    2**32 - 1,
    2**32,
    2**61,
    2**63 - 1,
    2**63,
    2**64 - 1,
]

#: Type, shape as the file has it, bytes.
_TENSORS = [
    *(
        (0, (3, 2), 24),
        (1, (5,), 10),
        (8, (64, 2), 136),
        (24, (), 1),
        (26, (0, 4), 0),
        (12, (256,), 144),
        (30, (7,), 14),
    ),
]


def random_file(rng: random.Random) -> bytes:
    """A valid file of a few pairs and tensors."""
    pairs = []
    for number in range(rng.randrange(4)):
        kind = rng.choice([*SCALARS, 8, 9])
        pairs.append(pair(f"k{number}", kind, _value(rng, kind, 0)))
    tensors, at = [], 0
    for number in range(rng.randrange(5)):
        kind, shape = rng.choice(
            [(0, (3, 2)), (1, (5,)), (8, (64, 2)), (24, ()), (26, (0, 4)), (12, (256,)), (30, (7,))]
        )
        nbytes = {0: 24, 1: 10, 8: 136, 24: 1, 26: 0, 12: 144, 30: 14}[kind]
        tensors.append(tensor(f"blk.{number}.w", shape, kind, at))
        at += -(-nbytes // 32) * 32 + 32 * rng.randrange(2)
    return pack(tuple(pairs), tuple(tensors), bytes(at), version=rng.choice([2, 3]))


def _value(rng: random.Random, kind: int, depth: int) -> bytes:
    if kind == 8:
        return string(rng.choice(["", "a", "é" * 5, "x" * 100]))
    if kind == 9:
        inner = rng.choice([*SCALARS, 8, *([9] if depth < 3 else [])])
        return array(inner, *(_value(rng, inner, depth + 1) for _ in range(rng.randrange(3))))
    return struct.pack("<" + SCALARS[kind], rng.randrange(2))


def spoiled(rng: random.Random) -> bytes:
    """A file that is valid, nearly valid or not at all."""
    data = bytearray(random_file(rng))
    for _ in range(rng.choice([0, 1, 1, 2, 4])):
        at = rng.randrange(len(data)) if data else 0
        what = rng.randrange(5)
        if what == 0:
            data[at : at + 1] = bytes([rng.randrange(256)])
        elif what == 1:
            width = rng.choice([4, 8])
            data[at : at + width] = (rng.choice(_NUMBERS) % 2 ** (8 * width)).to_bytes(width, "little")
        elif what == 2:
            del data[at : at + rng.choice([1, 4, 8, 50])]
        elif what == 3:
            data[at:at] = rng.randbytes(rng.choice([1, 4, 8]))
        else:
            data = data[:at]
    return bytes(data)


def written(path: Any, pairs: dict[str, Any], tensors: dict[str, Any], alignment: int | None = None) -> None:
    """A file by the gguf package; tensors are arrays, or ``(array of bytes, quantisation)``."""
    import gguf

    writer = gguf.GGUFWriter(path, "test")
    if alignment is not None:
        writer.add_custom_alignment(alignment)
    for key, value in pairs.items():
        add = {bool: writer.add_bool, int: writer.add_int64, float: writer.add_float64, str: writer.add_string}
        add.get(type(value), writer.add_array)(key, value)
    for name, value in tensors.items():
        if isinstance(value, tuple):
            writer.add_tensor(name, value[0], raw_dtype=value[1])
        else:
            writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
