"""Read while the CPU does something else; watch it; replace a file as a whole.

python examples/overlap.py
"""

import asyncio
import os
import tempfile

import numpy as np

import gpunvme


async def main(path: str) -> None:
    """Read the file without blocking the event loop."""
    with gpunvme.open(path) as file:
        memory = np.empty(file.size, np.uint8)
        transfer = file.read_into(memory, wait=False, timeout=60)
        print("meanwhile:", sum(range(1_000_000)))
        print("read:", await transfer)
        print(file.explain())


with tempfile.TemporaryDirectory() as directory:
    name = os.path.join(directory, "data.bin")
    with gpunvme.open(name, "w") as target:
        # A reader, or a crash, sees the old content or the new.
        target.write_from(np.arange(8_000_000, dtype=np.int64), atomic=True)
    asyncio.run(main(name))
