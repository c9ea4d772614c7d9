"""PyTorch: reads and writes as operators, feature tables as a dataset, state dicts saved and loaded.

Needs PyTorch 2.4 or later: the extra ``gpunvme[torch]``.
"""

try:
    import torch as _torch  # noqa: F401
except ModuleNotFoundError as error:
    if error.name != "torch":
        raise
    raise ModuleNotFoundError("gpunvme.torch needs PyTorch: pip install gpunvme[torch]", name="torch") from None

from gpunvme.torch.loading import load
from gpunvme.torch.operators import read_into_tensor, register, write_from_tensor
from gpunvme.torch.saving import save
from gpunvme.torch.tables import FeatureTable

__all__ = ["FeatureTable", "load", "read_into_tensor", "register", "save", "write_from_tensor"]
