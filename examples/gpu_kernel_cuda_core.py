"""A kernel of your own that reads from a drive, launched by cuda.core: the mean of each node's neighbours.

python examples/gpu_kernel_cuda_core.py                                     # a software controller, no hardware
python examples/gpu_kernel_cuda_core.py pci:0000:01:00.0                    # a drive that is bound to vfio-pci
"""

import sys
from pathlib import Path

import numpy as np
from cuda.bindings import driver
from cuda.core import Device, LaunchConfig, ObjectCode, launch

from gpunvme import gpu, nvme
from gpunvme.memory import Buffer

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
        device = Device(0)
        device.set_current()
        stream = device.create_stream()
        program = gpu.compile(source, device="cuda:0", name="mean_of_neighbours.cu")
        kernel = ObjectCode.from_cubin(program.image).get_kernel("mean_of_neighbours")
        ids, failed, out = (Buffer.empty(n, "cuda:0") for n in (neighbours.nbytes, 8, BATCH * FEATURES * 4))
        for target, array in ((ids, neighbours), (failed, np.zeros(1, np.uint64))):
            driver.cuMemcpyHtoD(target.ptr, array.ctypes.data, array.nbytes)
        config = LaunchConfig(grid=BATCH, block=256)
        arguments = (queues.handle, np.uint64(queues.count), ids.ptr, np.uint64(FANOUT), out.ptr, failed.ptr)
        launch(stream, config, kernel, *arguments)
        stream.sync()
        means, failures = out.numpy().view(np.float32).reshape(BATCH, FEATURES), int(failed.numpy().view(np.uint64)[0])

    expected = features.reshape(NODES, FEATURES)[neighbours].mean(1)
    print("equal:", np.allclose(means, expected, atol=1e-5), "- failed reads:", failures)
