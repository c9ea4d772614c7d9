"""NVMe controllers of other processes, by vfio-user: the way to one (client), and how to be one (server)."""

from gpunvme.nvme.vfio_user.client import VfioUserTransport
from gpunvme.nvme.vfio_user.server import serve

__all__ = ["VfioUserTransport", "serve"]
