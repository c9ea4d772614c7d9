"""``gpunvme config``: what compilers and linkers are told to use the library for C, and where gpunvme keeps files."""

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
    paths: Annotated[
        bool, typer.Option("--paths", help="What gpunvme keeps where, beside its package: a path, a tab, what it is.")
    ] = False,
) -> None:
    """Print how programs in C and C++ are built against this installation: cc x.c $(gpunvme config --cflags --libs)."""
    from gpunvme.c_library import c_library

    wanted_flags = cflags or libs or cmake or pkg_config or library
    if paths and not wanted_flags:
        _print_paths()
        return
    if paths or not wanted_flags:
        raise typer.BadParameter(
            "say what to print: --cflags, --libs, --cmake, --pkg-config or --library; or --paths alone"
        )
    found = c_library()
    words = (found.cflags if cflags else []) + (found.libs if libs else [])
    places = ((cmake, found.cmake), (pkg_config, found.pkg_config), (library, found.file))
    words += [str(path) for wanted, path in places if wanted]
    print(shlex.join(words))


def _print_paths() -> None:
    from gpunvme.kept_files import kept_files

    for each in kept_files():
        print(f"{each.path}\t{each.what}{'' if each.there else ' (not there)'}")
