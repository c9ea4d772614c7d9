"""Named regions in one large file, or on a raw namespace: tensors and records by name and number, changed as a whole.

python examples/catalog.py
"""

import os
import tempfile

import numpy as np

import gpunvme
from gpunvme import catalog

random = np.random.default_rng(0)

with tempfile.TemporaryDirectory() as directory:
    model = os.path.join(directory, "model.safetensors")
    weights = {f"layers.{i}.weight": random.random((64, 64), np.float32) for i in range(4)}
    gpunvme.save_file(weights, model)

    # A path here; "/dev/nvme1n1" or "nvme+pci:0000:01:00.0" is the same to everything below.
    target = os.path.join(directory, "regions")
    packed = catalog.pack(model, target)
    print("packed:", ", ".join(region.name for region in packed))

    with gpunvme.Catalog(target, "r+") as regions:
        table = random.random((10_000, 128), np.float32)
        with regions.change() as change:  # all of it, or nothing
            change.add(100, table, name="features")
            change.delete("layers.3.weight")
        print("damaged:", regions.verify() or "none")

    with gpunvme.Catalog(target) as regions:
        wanted = random.integers(0, len(table), 500)
        rows = regions.gather_kind("features", wanted)  # device="cuda" puts them into GPU memory
        print("gathered:", regions.last_transfer)
        print("equal:", np.array_equal(rows.numpy().view(np.float32), table[wanted]))
        loaded = regions.load(["layers.0.weight"], framework="np")
        print("equal:", np.array_equal(loaded["layers.0.weight"], weights["layers.0.weight"]))
        file, offset, nbytes, dtype, shape = regions.extents()["features"]
        print(f"features: {nbytes} bytes at {offset} of {file.name.rsplit('/')[-1]}, {dtype} {list(shape)}")
