"""A kernel of your own in Python that reads from a drive, by numba-cuda: the mean of each node's neighbours.

python examples/gpu_kernel_numba.py                                     # a software controller, no hardware
python examples/gpu_kernel_numba.py pci:0000:01:00.0                    # a drive that is bound to vfio-pci
"""

import sys
from pathlib import Path

import numpy as np
from numba import cuda, float32

from gpunvme import gpu, nvme

NODES, FEATURES, BATCH, FANOUT = 16_384, 1024, 2_000, 15
LANES = 32
EACH = FEATURES // LANES  # features of a lane
NBYTES = FEATURES * 4
source = (Path(__file__).parent / "read_row.cu").read_text()


def make_kernel(capability):
    """Compile read_row.cu for a GPU, so that it can be linked, and the kernel that calls it."""
    image = gpu.compile_to_cubin(source, capability, ["--relocatable-device-code=true"], "read_row.cu")
    read_row = cuda.declare_device(
        "read_row", "uint32(int64, int64, int64, int64, int64)", link=cuda.Cubin(image, name="read_row")
    )

    def mean_of_neighbours(queues, queue_count, neighbours, rows, rows_at, out, failed):
        """One warp a node, which reads each neighbour into the node's row and adds it up."""
        node, lane = cuda.blockIdx.x, cuda.threadIdx.x
        sums = cuda.local.array(EACH, float32)
        for j in range(EACH):
            sums[j] = 0
        for i in range(FANOUT):
            ok = read_row(queues, node % queue_count, neighbours[node, i], NBYTES, rows_at + node * NBYTES)
            if ok == 0 and lane == 0:
                cuda.atomic.add(failed, 0, 1)
            for j in range(EACH):
                sums[j] += rows[node, LANES * j + lane]
            cuda.syncwarp()  # all have read the row before the next one comes
        for j in range(EACH):
            out[node, LANES * j + lane] = sums[j] / FANOUT

    return mean_of_neighbours


def main():
    uri = sys.argv[1] if len(sys.argv) > 1 else f"soft:ram?size={NODES * NBYTES}&threads=4&queues=12"
    rng = np.random.default_rng(0)
    neighbours = rng.integers(0, NODES, (BATCH, FANOUT))

    with nvme.open(uri, queues=2) as controller:
        namespace = controller.namespace()
        if uri.startswith("soft:"):
            namespace.write_from(rng.random((NODES, FEATURES), np.float32))
        features = namespace.read(0, NODES * NBYTES // namespace.block_size).numpy().view(np.float32)

        with namespace.gpu_queues("cuda:0", count=8) as queues:
            print(queues)
            kernel = cuda.jit(make_kernel(cuda.get_current_device().compute_capability))
            ids = cuda.to_device(neighbours)
            rows, out = (cuda.device_array((BATCH, FEATURES), np.float32) for _ in range(2))
            failed = cuda.to_device(np.zeros(1, np.int64))
            rows_at = rows.__cuda_array_interface__["data"][0]
            # Addresses are signed here: in Numba, unsigned and signed integers together make floating point.
            kernel[BATCH, LANES](queues.handle, queues.count, ids, rows, rows_at, out, failed)
            means, failures = out.copy_to_host(), int(failed.copy_to_host()[0])

        expected = features.reshape(NODES, FEATURES)[neighbours].mean(1)
        print("equal:", np.allclose(means, expected, atol=1e-5), "- failed reads:", failures)


if __name__ == "__main__":
    main()
