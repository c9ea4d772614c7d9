"""``gpunvme nvme``: look at a controller, read and write its blocks, or be one."""

from __future__ import annotations

import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gpunvme.cli.output import Output, size, transfer_dict

if TYPE_CHECKING:
    from gpunvme.nvme import Namespace

Uri = Annotated[
    str,
    typer.Argument(
        metavar="URI",
        help="soft:FILE?size=64MiB, soft:ram?size=64MiB, vfio-user:SOCKET or pci:0000:01:00.0.",
        show_default=False,
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Nsid = Annotated[int, typer.Option("--namespace", "-n", help="Namespace id.")]
Lba = Annotated[int, typer.Option(help="First block.")]


def identify(uri: Uri, json: Json = False) -> None:
    """Say who a controller is, what it can do, and which namespaces it has."""
    from gpunvme import nvme

    output = Output(as_json=json)
    with nvme.open(uri) as controller:
        info, cap = controller.info, controller.registers.cap
        namespaces = controller.namespaces()
        document = {
            "uri": uri,
            "model": info.mn,
            "serial": info.sn,
            "firmware": info.fr,
            "version": str(controller.registers.vs),
            "nqn": info.subnqn,
            "max_transfer_bytes": info.max_transfer_bytes(cap.page_bytes_min),
            "queue_entries": cap.queue_entries,
            "io_queues": len(controller.io_queues),
            "page_bytes": controller.page_bytes,
            "doorbell_stride_bytes": 4 << cap.dstrd,
            "volatile_write_cache": info.volatile_write_cache,
            "namespaces": [_namespace(namespace) for namespace in namespaces],
        }
    output.document(document)
    largest = document["max_transfer_bytes"]
    output.facts(
        {
            "model": f"{info.mn}, firmware {info.fr}",
            "serial": info.sn,
            "NVMe": str(document["version"]),
            "largest transfer": size(largest) if isinstance(largest, int) else "no limit",
            "queues": f"{document['io_queues']} made, of up to {cap.queue_entries} entries",
            "pages": size(controller.page_bytes),
            "write cache": "volatile" if info.volatile_write_cache else "none that loses data",
        }
    )
    for each in namespaces:
        output.line(f"namespace {each.nsid}: {each.blocks} blocks of {each.block_size} bytes, {size(each.size)}")


def _namespace(namespace: Namespace) -> dict[str, Any]:
    return {
        "nsid": namespace.nsid,
        "blocks": namespace.blocks,
        "block_size": namespace.block_size,
        "nbytes": namespace.size,
    }


def smart(uri: Uri, json: Json = False) -> None:
    """Show health and endurance, and the errors that the controller has noted."""
    from gpunvme import nvme
    from gpunvme.nvme import status

    output = Output(as_json=json)
    with nvme.open(uri) as controller:
        log, errors = controller.smart(), controller.error_log()
    output.document({"smart": asdict(log), "errors": [asdict(error) for error in errors]})
    output.facts(
        {
            "warnings": ", ".join(log.warnings) or "none",
            "temperature": "not reported" if log.celsius is None else f"{log.celsius} °C",
            "read": size(log.bytes_read),
            "written": size(log.bytes_written),
            "used": f"{log.percentage_used} % of its endurance, {log.available_spare} % of its spare left",
            "powered on": f"{log.power_on_hours} h, {log.unsafe_shutdowns} times switched off without a shutdown",
            "media errors": str(log.media_errors),
        }
    )
    for error in errors:
        output.line(f"error {error.error_count}: {status.describe(error.status_field)} at LBA {error.lba}")


def regs(uri: Uri, json: Json = False) -> None:
    """Show all registers (not the doorbells) as they read now; the controller is left as it is."""
    from gpunvme.nvme.registers import Registers
    from gpunvme.nvme.transport import connect

    output = Output(as_json=json)
    transport = connect(uri)
    try:
        registers = Registers(transport)
        values = registers.dump()
        decoded = registers.decoded()
    finally:
        transport.close()
    output.document({"registers": values, "fields": decoded})
    for name, value in values.items():
        fields = " ".join(f"{field}={number}" for field, number in decoded.get(name, {}).items())
        output.line(f"{name:7} {value:#018x}  {fields}" if value >> 32 else f"{name:7}         {value:#010x}  {fields}")


def read(
    uri: Uri,
    lba: Lba = 0,
    blocks: Annotated[int | None, typer.Option(help="How many; to the end if not given.", show_default=False)] = None,
    out: Annotated[str, typer.Option("--out", "-o", help="File to write; - is standard output.")] = "-",
    nsid: Nsid = 1,
    json: Json = False,
) -> None:
    """Read blocks to a file or to standard output."""
    from gpunvme import nvme
    from gpunvme.memory import Buffer

    if out == "-" and json:
        raise typer.BadParameter("with --json the blocks need a file to go to: --out FILE")
    output = Output(as_json=json)
    with nvme.open(uri) as controller:
        namespace = controller.namespace(nsid)
        count = max(0, namespace.blocks - lba) if blocks is None else blocks
        buffer = Buffer.empty(count * namespace.block_size)
        with output.progress("read") as progress:
            transfer = namespace.read_into(buffer, lba, progress=progress)
    if out == "-":
        sys.stdout.buffer.write(buffer.numpy().data)
        sys.stdout.buffer.flush()
        return
    from gpunvme.replace import Replacement

    with Replacement(out) as replacement:
        replacement.file.write_from(buffer)
    output.document({"lba": lba, "blocks": count, "file": out, "read": transfer_dict(transfer)})
    output.line(str(transfer))


def write(
    uri: Uri,
    source: Annotated[str, typer.Argument(metavar="FILE", help="What to write.", show_default=False)],
    lba: Lba = 0,
    nsid: Nsid = 1,
    overwrite: Annotated[
        str | None,
        typer.Option(
            help="The device's name once more (for pci:, its address), to write over a partition table, a file system "
            "or a catalog.",
            show_default=False,
        ),
    ] = None,
    json: Json = False,
) -> None:
    """Write a file to blocks, and flush. The file must be a whole number of blocks."""
    import gpunvme
    from gpunvme import nvme
    from gpunvme.memory import Buffer

    output = Output(as_json=json)
    with gpunvme.open(source) as file:
        buffer = file.read()
    assert isinstance(buffer, Buffer)
    with nvme.open(uri, overwrite=overwrite) as controller:
        namespace = controller.namespace(nsid)
        with output.progress("write") as progress:
            transfer = namespace.write_from(buffer, lba, progress=progress)
        namespace.flush()
    output.document({"lba": lba, "file": source, "write": transfer_dict(transfer)})
    output.line(str(transfer))


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def soft(
    image: Annotated[
        str,
        typer.Argument(
            metavar="FILE[?OPTIONS]",
            help="The image, with the options of a soft: URI: disk.img?size=1GiB&lba=4096, or ram?size=64MiB.",
            show_default=False,
        ),
    ],
    socket: Annotated[str, typer.Option("--socket", "-s", help="Socket to be made.", show_default=False)],
) -> None:
    """Serve a software NVMe controller as a vfio-user device, until Ctrl-C or SIGTERM.

    Clients, one after another: this package (vfio-user:SOCKET), QEMU 10.1 or later (vfio-user-pci), SPDK.
    """
    from gpunvme.nvme.soft import soft_controller
    from gpunvme.nvme.uri import parse_uri
    from gpunvme.nvme.vfio_user import serve

    controller = soft_controller(parse_uri(image if image.startswith("soft:") else f"soft:{image}"))
    try:
        serve(
            socket,
            controller,
            ready=lambda: _say(f"serving {image} at {socket}"),
            report=_say,
        )
    finally:
        controller.stop()
