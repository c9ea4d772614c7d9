"""URIs of controllers: ``SCHEME:PATH?key=value&…``, percent-decoded."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote, unquote_to_bytes

from gpunvme.errors import UriError

_UNITS = {"": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}
_YES, _NO = {"1", "yes", "true", "on"}, {"0", "no", "false", "off"}


def parse_size(text: str) -> int:
    """Bytes in ``"4096"``, ``"64KiB"``, ``"64 MiB"`` or ``"2GiB"``.

    Raises
    ------
    ValueError
        If it is none of these.
    """
    match = re.fullmatch(r"(\d+) ?([KMGT]iB)?", text.strip())
    if match is None:
        raise ValueError(f"{text!r} is no size: write bytes, or a number with KiB, MiB, GiB or TiB behind it")
    return int(match[1]) * _UNITS[match[2] or ""]


def _number(text: str) -> int:
    try:
        return int(text, 0)
    except ValueError:
        raise ValueError(f"{text!r} is no number") from None


def _truth(text: str) -> bool:
    if text.lower() in _YES | _NO:
        return text.lower() in _YES
    raise ValueError(f"{text!r} is neither 1 nor 0")


# What may stand behind the question mark of each scheme, and how it is read.
OPTIONS: Mapping[str, Mapping[str, Callable[[str], Any]]] = {
    "soft": {
        "size": parse_size,
        "lba": _number,
        "mdts": _number,
        "queues": _number,
        "dstrd": _number,
        "threads": _number,
        "mqes": _number,
        "mpsmin": _number,
        "mpsmax": _number,
        "cqr": _truth,
        "vwc": _truth,
        "namespaces": _number,
        "to": _number,
        "faults": str,
        "seed": _number,
        "serial": str,
        "read_only": _truth,
    },
    "vfio-user": {},
    "pci": {"noiommu": _truth, "via": str},
    "kmod": {},
}
_EXAMPLES = {
    "soft": "soft:disk.img?size=64MiB or soft:ram?size=64MiB",
    "vfio-user": "vfio-user:/run/nvme/cntrl",
    "pci": "pci:0000:01:00.0",
    "kmod": "kmod:/dev/gpunvme0",
}


@dataclass(frozen=True, slots=True)
class Uri:
    """A parsed URI. ``path`` is what stands between scheme and options, percent-decoded; ``options`` are converted."""

    text: str
    scheme: str
    path: str
    options: Mapping[str, Any]

    @property
    def path_bytes(self) -> bytes:
        """The path as a file name."""
        return os.fsencode(self.path)


def parse_uri(text: str) -> Uri:
    """Take a controller's URI apart and check its options.

    Raises
    ------
    UriError
        If the scheme or an option is unknown or has a bad value; says what is valid.
    """
    scheme, colon, rest = text.partition(":")
    if not colon or scheme not in OPTIONS:
        known = "; ".join(_EXAMPLES[name] for name in OPTIONS)
        raise UriError(f"{text!r} is no controller's URI: {scheme!r} is not a known scheme. Valid: {known}")
    path, _, query = rest.partition("?")
    path = os.fsdecode(unquote_to_bytes(path))
    if not path:
        raise UriError(f"{text!r} names nothing behind {scheme!r}:. An example: {_EXAMPLES[scheme]}")
    return Uri(text, scheme, path, _options(text, scheme, query))


def _options(text: str, scheme: str, query: str) -> dict[str, Any]:
    known = OPTIONS[scheme]
    options: dict[str, Any] = {}
    for item in filter(None, query.split("&")):
        name, _, value = item.partition("=")
        name = unquote(name)
        if name not in known:
            valid = ", ".join(sorted(known)) or "none"
            raise UriError(f"{text!r}: {scheme}: has no option {name!r}. Valid options: {valid}")
        if name in options:
            raise UriError(f"{text!r}: option {name!r} is given twice")
        try:
            options[name] = known[name](unquote(value))
        except ValueError as error:
            raise UriError(f"{text!r}: option {name!r}: {error}") from None
    return options


def split_source(text: str) -> tuple[str, int]:
    """Take ``nvme+URI`` with its ``nsid=`` apart: the controller's URI, and the namespace (1 if not given).

    Raises
    ------
    UriError
        If ``nsid`` is no namespace id.
    """
    uri = text.removeprefix("nvme+")
    head, mark, query = uri.partition("?")
    nsid = 1
    others = []
    for item in query.split("&") if mark else []:
        name, _, value = item.partition("=")
        if name != "nsid":
            others.append(item)
            continue
        try:
            nsid = int(value, 0)
        except ValueError:
            nsid = 0
        if not 1 <= nsid <= 0xFFFFFFFE:
            raise UriError(f"{text!r}: nsid {value!r} is no namespace id; they start at 1")
    return head + ("?" + "&".join(others) if others else ""), nsid
