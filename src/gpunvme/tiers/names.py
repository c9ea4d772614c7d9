"""Names of files on tiers: relative, plain, and never a way out of a tier's directory."""

from __future__ import annotations

import os

from gpunvme.errors import TierNameError

#: The directory on each tier that is ours; no file's name starts with it.
PRIVATE = ".gpunvme-tier"
LONGEST_NAME = 1024  # bytes; PATH_MAX is 4096 and the tier's directory is part of that
LONGEST_PART = 255  # bytes; NAME_MAX of Linux's file systems
DEEPEST = 32


def parts_of(name: str) -> tuple[str, ...]:
    """Check a file's name and take it apart.

    Parameters
    ----------
    name
        Such as ``"model.safetensors"`` or ``"llama/shard-1.safetensors"``.

    Raises
    ------
    TierNameError
        If it is absolute, has an empty, ``.`` or ``..`` part, control characters (NUL too), is not UTF-8, is too long
        or too deep, or is in the directory that is ours.
    TypeError
        If it is no string.
    """
    if not isinstance(name, str):
        raise TypeError(f"a name must be a str, not {type(name).__name__}")
    try:
        encoded = name.encode()
    except UnicodeEncodeError:
        raise TierNameError(f"name {name!r} is not valid UTF-8") from None
    if not name:
        raise TierNameError("a name must have at least one character")
    if name.startswith("/"):
        raise TierNameError(f"name {name!r} is absolute; names are relative to the tier's directory")
    if not name.isprintable():
        raise TierNameError(f"name {name!r} has control or other characters that cannot be printed")
    if len(encoded) > LONGEST_NAME:
        raise TierNameError(f"name {name[:40]!r}… has {len(encoded)} bytes; the limit is {LONGEST_NAME}")
    parts = tuple(name.split("/"))
    for part in parts:
        if part in ("", ".", ".."):
            raise TierNameError(f"name {name!r} has a part {part!r}; write it without")
        if len(os.fsencode(part)) > LONGEST_PART:
            raise TierNameError(f"name {name[:40]!r}…: a part has more than {LONGEST_PART} bytes")
    if len(parts) > DEEPEST:
        raise TierNameError(f"name {name[:40]!r}… has {len(parts)} parts; the limit is {DEEPEST}")
    if parts[0] == PRIVATE:
        raise TierNameError(f"name {name!r}: {PRIVATE!r} belongs to the tiers themselves")
    return parts
