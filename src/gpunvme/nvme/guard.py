"""Nobody's data is written over by accident: what is looked at before the first write to a namespace."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gpunvme.errors import UnsafeDeviceError

if TYPE_CHECKING:
    from gpunvme.nvme.namespace import Namespace


def refuse_data(namespace: Namespace) -> None:
    """Refuse a namespace that holds a partition table, a file system or the like.

    Images of the software controller in this process are files of the caller's: they are not looked at.

    Raises
    ------
    UnsafeDeviceError
        If it holds any, and the controller was not opened with ``overwrite=`` and its device's name.
    """
    from gpunvme.nvme.signatures import find_signature

    controller = namespace.controller
    scheme, _, device = controller.transport.uri.partition(":")
    device = device.partition("?")[0]
    if scheme == "soft" or controller.overwrite == device:
        return

    def read(offset: int, nbytes: int) -> bytes:
        block = namespace.block_size
        first, last = offset // block, -(-(offset + nbytes) // block)
        data = namespace.read(first, last - first).numpy().tobytes()
        return data[offset - first * block :][:nbytes]

    found = find_signature(read, namespace.size)
    if found:
        asked = f" (overwrite={controller.overwrite!r} is not its name)" if controller.overwrite else ""
        raise UnsafeDeviceError(
            f"{namespace.name} holds {found}; it would be lost. To write all the same, open the controller with "
            f"overwrite={device!r}{asked}"
        )
