"""Processor time that one 4 KiB read of a hot image costs, driver and software controller in turns on one thread.

Needs the native tests (`make native-plain`). Programs of several versions take turns: name each with --program. Time of
the processor, not of the clock: it depends less on what else the machine does.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
from pathlib import Path

from gpunvme.bench import page_cache
from gpunvme.bench.scratch import random_pieces, roomy_directory
from session import GIB, size

BLOCK = 4096
LENGTHS = (500_000, 2_500_000)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--program", action="append", help="build/plain/native/test_nvme_one_thread unless given")
    parser.add_argument("--size", type=size, default=GIB, help="of the image (default: 1GiB)")
    parser.add_argument("--depth", type=int, default=129, help="of the queue; 2: one read at a time (default: 129)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", default="hot_image.json")
    arguments = parser.parse_args()
    programs = arguments.program or ["build/plain/native/test_nvme_one_thread"]
    image = Path(roomy_directory(arguments.size)) / "gpunvme-hot-image"
    try:
        with image.open("wb") as file:
            for piece in random_pieces(arguments.size):
                file.write(piece)
        found: dict[str, list[float]] = {program: [] for program in programs}
        for _ in range(arguments.rounds):
            for program in programs:
                page_cache.bring(str(image), "hot", arguments.size)
                short, long = (
                    seconds(program, image, arguments.size, commands, arguments.depth) for commands in LENGTHS
                )
                # What is done once, whatever the length, is in both and goes away.
                found[program].append((long - short) / (LENGTHS[1] - LENGTHS[0]) * 1e6)
    finally:
        image.unlink(missing_ok=True)
    Path(arguments.out).write_text(json.dumps({"microseconds_per_command": found}, indent=2))
    for program, each in found.items():
        print(f"{program}: {statistics.median(each):.2f} us a command ({min(each):.2f} to {max(each):.2f})")


def seconds(program: str, image: Path, nbytes: int, commands: int, depth: int) -> float:
    """Read so many blocks at random; return the processor time of it, in user and in kernel mode."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    settings = {
        "GPUNVME_IMAGE": image,
        "GPUNVME_BLOCKS": nbytes // BLOCK,
        "GPUNVME_COMMANDS": commands,
        "GPUNVME_DEPTH": depth,
    }
    environment = {**os.environ, **{name: str(value) for name, value in settings.items()}}
    subprocess.run([program, "commands"], env=environment, check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


if __name__ == "__main__":
    main()
