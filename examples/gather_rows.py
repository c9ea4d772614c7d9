"""Random rows of a table on disk, as a data loader needs them: one call, packed in order.

python examples/gather_rows.py
"""

import os
import tempfile

import numpy as np

import gpunvme

ROWS, COLUMNS = 100_000, 256

with tempfile.TemporaryDirectory() as directory:
    path = os.path.join(directory, "features.f32")
    table = np.random.default_rng(0).random((ROWS, COLUMNS), np.float32)
    with gpunvme.open(path, "w") as file:
        print("written:", file.write_from(table, fsync=True))

    wanted = np.random.default_rng(1).integers(0, ROWS, 20_000)
    row_bytes = table.itemsize * COLUMNS
    with gpunvme.open(path) as file:
        rows = file.gather(wanted * row_bytes, row_bytes)  # device="cuda" puts them into GPU memory
        print("gathered:", file.last_transfer)

    batch = rows.numpy().view(np.float32)
    print("equal:", np.array_equal(batch, table[wanted]))
