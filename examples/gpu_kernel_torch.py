"""A kernel of your own that reads from a drive, on PyTorch's tensors: the mean of each node's neighbours.

python examples/gpu_kernel_torch.py                                     # a software controller, no hardware
python examples/gpu_kernel_torch.py pci:0000:01:00.0                    # a drive that is bound to vfio-pci
"""

import sys
from pathlib import Path

import numpy as np
import torch

from gpunvme import gpu, nvme

NODES, FEATURES, BATCH, FANOUT = 16_384, 1024, 2_000, 15
source = (Path(__file__).parent / "mean_of_neighbours.cu").read_text()
uri = sys.argv[1] if len(sys.argv) > 1 else f"soft:ram?size={NODES * FEATURES * 4}&threads=4&queues=12"
rng = np.random.default_rng(0)
neighbours = rng.integers(0, NODES, (BATCH, FANOUT))

with nvme.open(uri, queues=2) as controller:
    namespace = controller.namespace()
    if uri.startswith("soft:"):
        namespace.write_from(rng.random((NODES, FEATURES), np.float32))
    features = namespace.read(0, NODES * FEATURES * 4 // namespace.block_size).numpy().view(np.float32)

    with namespace.gpu_queues("cuda:0", count=8) as queues:
        print(queues)
        program = gpu.compile(source, device="cuda:0", name="mean_of_neighbours.cu")
        kernel = program.kernel("mean_of_neighbours")
        ids = torch.as_tensor(neighbours).cuda()
        out = torch.empty(BATCH, FEATURES, device="cuda")
        failed = torch.zeros(1, dtype=torch.int64, device="cuda")
        kernel.launch(BATCH, 256, queues, queues.count, ids, FANOUT, out, failed)  # in torch's current stream
        means, failures = out.cpu().numpy(), int(failed)

    expected = features.reshape(NODES, FEATURES)[neighbours].mean(1)
    print("equal:", np.allclose(means, expected, atol=1e-5), "- failed reads:", failures)
