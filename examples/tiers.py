"""Files on a fast and a slow directory: the ones that are read move up, the others down.

python examples/tiers.py
"""

import os
import tempfile

import gpunvme

with tempfile.TemporaryDirectory() as directory:
    tiers = {name: os.path.join(directory, name) for name in ("nvme", "hdd")}  # yours: /mnt/nvme, /mnt/hdd
    for path in tiers.values():
        os.mkdir(path)
    for name in ("often", "seldom"):
        with open(os.path.join(directory, name), "wb") as source:
            source.write(os.urandom(1 << 20))

    with gpunvme.TierManager(tiers, warm=10, capacity={"nvme": 3 << 19}) as manager:
        for name in ("seldom", "often"):
            manager.add(os.path.join(directory, name))  # the second one does not fit any more

        with manager.open("often") as file:
            for _ in range(20):
                rows = file.gather(range(0, 1 << 20, 4096), 4096)
            print("read:", file.last_transfer)

        for decision in manager.balance():  # manager.start() does this in the background
            print(decision)
        for file in manager.status().files:
            print(f"{file.name} is on {file.tier}: {file.temperature}, {file.accesses} accesses")
