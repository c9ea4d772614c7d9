"""Instructions that one NVMe command costs the driver and the software controller, stepped in turns on one thread.

Needs valgrind and the native tests (`make native-plain`). Counts do not depend on what else the machine does.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path

LENGTHS = (20_480, 122_880)
SIDES = {
    "driver": re.compile(r"gpunvme::(IoRun|IoQueue|IoMemory|QueuePair|Work|PrpBuilder)"),
    "controller": re.compile(r"gpunvme::soft::"),
    "copying": re.compile(r"mem(cpy|move|set)"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--program", default="build/plain/native/test_nvme_one_thread")
    parser.add_argument("--out", default="nvme_instructions.json")
    arguments = parser.parse_args()
    short, long = (count(arguments.program, commands) for commands in LENGTHS)
    # What is done once, whatever the length, is in both and goes away.
    each = {side: (long[side] - short[side]) / (LENGTHS[1] - LENGTHS[0]) for side in (*SIDES, "other")}
    Path(arguments.out).write_text(json.dumps({"instructions_per_command": each}, indent=2))
    for side, instructions in each.items():
        print(f"{side:12s} {instructions:8.0f}")


def count(program: str, commands: int) -> Counter[str]:
    """Run so many commands, and return the instructions of each side."""
    with tempfile.TemporaryDirectory() as directory:
        profile = f"{directory}/profile"
        subprocess.run(
            ["valgrind", "--tool=callgrind", f"--callgrind-out-file={profile}", program, "commands"],
            env={**os.environ, "GPUNVME_COMMANDS": str(commands)},
            check=True,
            capture_output=True,
        )
        listing = subprocess.run(
            ["callgrind_annotate", "--threshold=100", profile], check=True, capture_output=True, text=True
        ).stdout
    found: Counter[str] = Counter()
    for line in listing.splitlines():
        match = re.match(r"\s*([\d,]+) \([\d. ]+%\)\s+(.*)", line)
        if match and "PROGRAM TOTALS" not in match[2]:
            side = next((name for name, pattern in SIDES.items() if pattern.search(match[2])), "other")
            found[side] += int(match[1].replace(",", ""))
    return found


if __name__ == "__main__":
    main()
