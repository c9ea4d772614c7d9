"""Catalogs: named, numbered regions in one large file, on a block device or on a raw namespace.

`catalog` is the face; `target` is where catalogs lie and who may write there; `generation` is what one version of a
catalog holds; `change` makes the next version; `contents` are the bytes of a region on their way; `packing` takes
checkpoints in. The format, docs/catalog-format.md, is read and written by native/catalog.
"""

from gpunvme.catalog.catalog import Catalog
from gpunvme.catalog.change import Change
from gpunvme.catalog.contents import FilePart
from gpunvme.catalog.generation import Region
from gpunvme.catalog.packing import pack

__all__ = ["Catalog", "Change", "FilePart", "Region", "pack"]
