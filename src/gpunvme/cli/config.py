"""``gpunvme config``: what compilers, linkers and build systems are told to use the library for C."""

from __future__ import annotations

import shlex
from typing import Annotated

import typer


def config(
    cflags: Annotated[bool, typer.Option("--cflags", help="Flags for the compiler.")] = False,
    libs: Annotated[bool, typer.Option("--libs", help="Flags for the linker.")] = False,
    cmake: Annotated[bool, typer.Option("--cmake", help="Directory for cmake -Dgpunvme_DIR=…")] = False,
    pkg_config: Annotated[bool, typer.Option("--pkg-config", help="Directory for PKG_CONFIG_PATH.")] = False,
    library: Annotated[bool, typer.Option("--library", help="The library itself, for dlopen.")] = False,
) -> None:
    """Print how programs in C and C++ are built against this installation: cc x.c $(gpunvme config --cflags --libs)."""
    from gpunvme.c_library import c_library

    if not (cflags or libs or cmake or pkg_config or library):
        raise typer.BadParameter("say what to print: --cflags, --libs, --cmake, --pkg-config or --library")
    found = c_library()
    words = (found.cflags if cflags else []) + (found.libs if libs else [])
    paths = ((cmake, found.cmake), (pkg_config, found.pkg_config), (library, found.file))
    words += [str(path) for wanted, path in paths if wanted]
    print(shlex.join(words))
