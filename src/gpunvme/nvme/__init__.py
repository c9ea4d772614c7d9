"""NVMe controllers, driven from user space.

`open` takes a controller over; `Controller.namespace` gives its blocks. How a controller is driven can be read from
`spec` (what the specification fixes), `registers` (from reset to ready), `admin` (a whole queue pair in Python),
`queues` and `controller`; ways to controllers are in `transport` and the modules that it names.
"""

from gpunvme.nvme.controller import Controller, open
from gpunvme.nvme.namespace import Namespace

__all__ = ["Controller", "Namespace", "open"]
