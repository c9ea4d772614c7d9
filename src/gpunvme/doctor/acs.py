"""Access Control Services of a bridge, from its configuration space (PCI Express Base Specification 6.0, 7.7.11)."""

from __future__ import annotations

import struct

_EXTENDED = 0x100
_ACS = 0x000D
# P2P Request Redirect, P2P Completion Redirect, P2P Egress Control: each keeps peers from talking below a switch.
_REDIRECT = 1 << 2 | 1 << 3 | 1 << 5
_MOST_CAPABILITIES = 64


def redirects(config: bytes) -> bool | None:
    """Tell whether a bridge sends transfers between peers up to the root.

    Parameters
    ----------
    config
        Its configuration space: 4096 bytes for root, 64 for others.

    Returns
    -------
    bool or None
        None if the extended capabilities are not among the bytes, or make no sense.
    """
    if len(config) < _EXTENDED + 4:
        return None
    at = _EXTENDED
    for _ in range(_MOST_CAPABILITIES):
        if at + 8 > len(config):
            return None
        (header,) = struct.unpack_from("<I", config, at)
        if header in (0, 0xFFFFFFFF):
            return False if header == 0 else None
        if header & 0xFFFF == _ACS:
            (control,) = struct.unpack_from("<H", config, at + 6)
            return bool(control & _REDIRECT)
        at = header >> 20 & ~3
        if at == 0:
            return False
        if at < _EXTENDED:
            return None
    return None
