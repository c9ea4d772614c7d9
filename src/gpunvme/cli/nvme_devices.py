"""``gpunvme nvme list | topology | bind | unbind``: NVMe controllers on the PCI bus, and which driver has them."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from gpunvme.cli.output import Output, size

if TYPE_CHECKING:
    from gpunvme.nvme.bind import Change
    from gpunvme.nvme.sysfs import ControllerInfo, Function

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Bdf = Annotated[str, typer.Argument(metavar="BDF", help="PCI address, such as 0000:01:00.0.", show_default=False)]


def list_controllers(json: Json = False) -> None:
    """List the NVMe controllers on the PCI bus, whichever driver has them."""
    from gpunvme.nvme import sysfs

    output = Output(as_json=json)
    found = sysfs.list_controllers()
    output.document({"controllers": [asdict(each) for each in found]})
    for each in found:
        function = each.function
        group = "no IOMMU group" if function.iommu_group is None else f"IOMMU group {function.iommu_group}"
        what = f"{each.name}: {each.model or 'model unknown'}" if each.name else "NVMe controller"
        output.line(f"{function.address}  {what}, driver {function.driver or 'none'}, {group}, {_link(function)}")
        for namespace in each.namespaces:
            output.line(f"  {namespace.name}  {size(namespace.nbytes)} in blocks of {namespace.block_size} bytes")
    if not found:
        output.line("There is no NVMe controller on the PCI bus.")


def _link(function: Function) -> str:
    if function.speed is None or function.width is None:
        return "link unknown"
    now = f"{function.speed:g} GT/s x{function.width}"
    if (function.speed, function.width) == (function.max_speed, function.max_width) or function.max_speed is None:
        return now
    return f"{now} (possible: {function.max_speed:g} GT/s x{function.max_width})"


def topology(json: Json = False) -> None:
    """Show how near each NVMe controller is to each GPU."""
    from gpunvme.nvme import sysfs

    output = Output(as_json=json)
    found = sysfs.topology()
    output.document(asdict(found))
    for controller in found.controllers:
        output.line(f"{controller.function.address}  {_name(controller)}, {_link(controller.function)}")
    for gpu in found.gpus:
        output.line(f"{gpu.address}  {gpu.kind}, {_link(gpu)}")
    words = {
        "switch": "below one switch or port, {through}",
        "host bridge": "below one host bridge, {through}: through the CPU",
        "node": "below different host bridges of one NUMA node",
        "other node": "on different NUMA nodes",
    }
    for pair in found.pairs:
        output.line(f"{pair.controller} to {pair.gpu}: {words[pair.kind].format(through=pair.through)}")
    if not found.pairs:
        output.line("There is no pair of an NVMe controller and a GPU on the PCI bus.")


def _name(controller: ControllerInfo) -> str:
    return f"{controller.name}, {controller.model}" if controller.name else "NVMe controller"


def bind(
    bdf: Bdf,
    driver: Annotated[str, typer.Option(help="Who gets it.")] = "vfio-pci",
    overwrite: Annotated[
        str | None,
        typer.Option(help="The address once more, to take a controller that holds data.", show_default=False),
    ] = None,
    noiommu: Annotated[
        bool, typer.Option("--noiommu", help="Without an IOMMU: the controller can then write to all memory.")
    ] = False,
    json: Json = False,
) -> None:
    """Take a controller from the kernel for use as pci:BDF, if nobody uses it and it holds nothing."""
    from gpunvme.nvme import bind as binding
    from gpunvme.nvme.sysfs import Machine

    output = Output(as_json=json)
    change = binding.bind(bdf, driver, overwrite=overwrite, noiommu=noiommu)
    uri = f"pci:{change.address}"
    if driver == binding.OWN_DRIVER:
        uri = " or ".join(f"kmod:{node}" for node in binding.user_nodes(change.address, Machine()))
    _report(output, change, f"open it as {uri}; `gpunvme nvme unbind {change.address}` gives it back")


def unbind(bdf: Bdf, json: Json = False) -> None:
    """Give a controller back to the kernel's own driver."""
    from gpunvme.nvme import bind as binding

    output = Output(as_json=json)
    change = binding.unbind(bdf)
    _report(output, change, f"its block devices: {', '.join(change.namespaces) or 'none'}")


def _report(output: Output, change: Change, what_next: str) -> None:
    output.document(asdict(change))
    if change.changed:
        output.line(
            f"{change.address}: from {change.before or 'no driver'} to {change.after or 'no driver'}; {what_next}"
        )
    else:
        output.line(f"{change.address} is with {change.after} already; {what_next}")
