"""Where the library for C lies in the installed package, and what compilers are told about it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import gpunvme
from gpunvme.errors import FileError


@dataclass(frozen=True)
class CLibrary:
    """An installed libgpunvme.

    Attributes
    ----------
    include
        Directory of ``gpunvme/gpunvme.h``.
    lib
        Directory that the linker searches.
    file
        The library itself, for dlopen(3).
    """

    include: Path
    lib: Path
    file: Path

    @property
    def cflags(self) -> list[str]:
        """What a compiler needs."""
        return [f"-I{self.include}"]

    @property
    def libs(self) -> list[str]:
        """What a linker needs; the program finds the library where it is now."""
        return [f"-L{self.lib}", f"-Wl,-rpath,{self.lib}", "-lgpunvme"]

    @property
    def cmake(self) -> Path:
        """Directory of ``gpunvmeConfig.cmake``, for ``-Dgpunvme_DIR``."""
        return self.lib / "cmake"

    @property
    def pkg_config(self) -> Path:
        """Directory of ``gpunvme.pc``, for ``PKG_CONFIG_PATH``."""
        return self.lib / "pkgconfig"


def c_library() -> CLibrary:
    """Find the library that was installed with this package.

    Raises
    ------
    FileError
        If it is not there, or another one than its header describes.
    """
    places = [Path(each) for each in gpunvme.__path__]
    for place in places:
        header = place / "include" / "gpunvme" / "gpunvme.h"
        if not header.is_file():
            continue
        version = re.search(r"^#define GPUNVME_API_VERSION (\d+)$", header.read_text(), re.MULTILINE)
        file = place / "lib" / f"libgpunvme.so.{version[1] if version else '?'}"
        if file.is_file():
            return CLibrary(place / "include", place / "lib", file)
    raise FileError(2, "libgpunvme is not in the package: install gpunvme again", str(places[0] / "lib"))
