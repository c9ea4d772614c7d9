"""Nobody's data is written over by accident: what is looked at before the first write to a namespace."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from gpunvme.errors import UnsafeDeviceError

if TYPE_CHECKING:
    from gpunvme.nvme.namespace import Namespace
    from gpunvme.nvme.signatures import Read


def refuse_data(namespace: Namespace, *, catalog: bool = False) -> None:
    """Refuse a namespace that holds a partition table, a file system, one of our catalogs or the like.

    Images of the software controller in this process are files of the caller's: only catalogs are looked for there, and
    in the file itself, so that no command is sent that a fault could be meant for.

    Parameters
    ----------
    namespace
        Which one will be written.
    catalog
        Whether it is a catalog's writer who asks, and a catalog is what belongs there.

    Raises
    ------
    UnsafeDeviceError
        If it holds any, and the controller was not opened with ``overwrite=`` and its device's name.
    """
    from gpunvme.nvme.signatures import CATALOG, find_signatures, in_words

    controller = namespace.controller
    scheme, _, device = controller.transport.uri.partition(":")
    device = device.partition("?")[0]
    image = scheme == "soft"
    if controller.overwrite == device or (image and (catalog or device == "ram")):
        return
    found = find_signatures(_image_of(namespace) if image else _blocks_of(namespace), namespace.size)
    found = [each for each in found if (not catalog if each.kind == CATALOG else not image)]
    if found:
        asked = f" (overwrite={controller.overwrite!r} is not its name)" if controller.overwrite else ""
        raise UnsafeDeviceError(
            f"{namespace.name} holds {in_words(found)}; it would be lost. To write all the same, open the controller "
            f"with overwrite={device!r}{asked}"
        )


def _blocks_of(namespace: Namespace) -> Read:
    def read(offset: int, nbytes: int) -> bytes:
        block = namespace.block_size
        first, last = offset // block, -(-(offset + nbytes) // block)
        data = namespace.read(first, last - first).numpy().tobytes()
        return data[offset - first * block :][:nbytes]

    return read


def _image_of(namespace: Namespace) -> Read:
    from gpunvme.nvme.uri import parse_uri

    # Namespaces of the software controller divide its image into equal parts (Device, native/soft).
    begin = (namespace.nsid - 1) * namespace.size

    def read(offset: int, nbytes: int) -> bytes:
        with open(parse_uri(namespace.controller.transport.uri).path_bytes, "rb") as file:
            return os.pread(file.fileno(), nbytes, begin + offset)

    return read
