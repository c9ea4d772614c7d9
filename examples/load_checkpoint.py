"""Load a checkpoint, to a GPU where there is one, and say how its bytes travelled.

python examples/load_checkpoint.py model.safetensors
"""

import sys

import gpunvme

source = sys.argv[1]
gpu = "" if "--cpu" in sys.argv else "cuda"
try:
    weights = gpunvme.load_file(source, device=gpu or "cpu", report=print)
except (gpunvme.CudaError, gpunvme.SpanError) as reason:
    print(f"not to a GPU: {reason}")
    weights = gpunvme.load_file(source, report=print)

for name, tensor in list(weights.items())[:5]:
    print(f"{name:60} {tensor.dtype!s:16} {tuple(tensor.shape)}")
print(f"{len(weights)} tensors")
