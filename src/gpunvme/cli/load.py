"""``gpunvme load``: a checkpoint into memory, with the report of how it came."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from gpunvme.cli.output import Output, size, transfer_dict
from gpunvme.cli.tally import Tally

if TYPE_CHECKING:
    from gpunvme.transfer import Transfer


def load(
    checkpoint: Annotated[
        str,
        typer.Argument(help="A .safetensors file, a directory of them, or an index.json.", show_default=False),
    ],
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    dtype: Annotated[
        str | None, typer.Option(help="Convert floating tensors to this type, such as bfloat16.", show_default=False)
    ] = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Compare every tensor with the safetensors library, bit by bit.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Load a checkpoint and report which path carried its bytes. The tensors are dropped afterwards."""
    import gpunvme
    from gpunvme.cli.device import resolve_device
    from gpunvme.errors import Error

    output = Output(as_json=json)
    where = resolve_device(device, tensors=True)
    reports: list[Transfer] = []
    with output.progress("load") as progress:
        try:
            tensors: dict[str, Any] = gpunvme.load_file(
                checkpoint, device=where, dtype=dtype, progress=progress, report=reports.append
            )
        except ValueError as error:
            if isinstance(error, Error):
                raise
            raise typer.BadParameter(str(error)) from error
    total = Tally()
    for transfer in reports:
        total.add(transfer)
    verified: dict[str, Any] | None = None
    if verify:
        from gpunvme.cli.verify import compare_with_safetensors

        with output.progress("verify") as progress:
            verified = compare_with_safetensors(checkpoint, tensors, dtype=dtype, progress=progress).as_dict()
    output.document(
        {
            "checkpoint": checkpoint,
            "device": where,
            "tensors": len(tensors),
            "nbytes": total.nbytes,
            "transfers": [transfer_dict(transfer) for transfer in reports],
            "verified": verified,
        }
    )
    output.line(f"{len(tensors)} tensors to {where}")
    # A conversion goes through staging memory, one transfer a group.
    output.line(str(reports[0] if len(reports) == 1 else total))
    if verified is not None:
        output.line(f"verified: all {size(verified['nbytes'])} equal what the safetensors library loads, bit by bit")
