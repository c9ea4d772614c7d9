"""`GgufFile`: what a GGUF file holds. Tensors are loaded by `load_file`, layers by `LayerLoader`."""

from __future__ import annotations

import os

from gpunvme import file as files
from gpunvme.models import gguf_header
from gpunvme.models.gguf_header import GgufTensor, Metadata
from gpunvme.models.gguf_types import GGUF_TYPES, GgufType

__all__ = ["GGUF_TYPES", "GgufFile", "GgufTensor", "GgufType", "Metadata"]


class GgufFile:
    """The header of a GGUF file, version 2 or 3, little-endian. Nothing is kept open.

    Parameters
    ----------
    filename
        The file.

    Attributes
    ----------
    filename
        Its name.
    version
        Version of the format.
    alignment
        What tensors' offsets are multiples of, in bytes.
    metadata
        Free-form values by key, each decoded when it is asked for.
    tensors
        Every tensor by name, in the order of the file's bytes: ``.type``, ``.shape``, ``.offset``, ``.nbytes``.
    data_offset
        File offset of the first tensor byte.

    Raises
    ------
    FormatError
        The file is not valid, or of a version or byte order that is not read here.
    FileError
        The file is missing or cannot be read.

    Examples
    --------
    >>> header = gpunvme.GgufFile("model.gguf")  # doctest: +SKIP
    >>> header.metadata["general.architecture"]  # doctest: +SKIP
    'llama'
    >>> tensor = header.tensors["blk.0.attn_q.weight"]  # doctest: +SKIP
    >>> tensor.type.name, tensor.shape, tensor.stored_shape  # doctest: +SKIP
    ('Q4_K', (4096, 4096), (4096, 2304))
    """

    def __init__(self, filename: str | os.PathLike[str]) -> None:
        self.filename = os.fspath(filename)
        with files.open(self.filename) as file:
            header = gguf_header.read(file.fileno(), file.size, self.filename)
        self.version = header.version
        self.alignment = header.alignment
        self.metadata = header.metadata
        self.tensors = header.described
        self.data_offset = header.data_offset

    def __repr__(self) -> str:
        return f"<gpunvme.GgufFile {self.filename!r}, {len(self.tensors)} tensors, {len(self.metadata)} metadata keys>"
