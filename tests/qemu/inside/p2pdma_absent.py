"""In a guest whose kernel cannot do it: every refusal has its reason."""

from __future__ import annotations

from pathlib import Path

from checking import check, modprobe, namespace_path, refusal

import gpunvme
from gpunvme.errors import PathError, UriError

PEER = "0000:04:00.0"


@check()
def the_kernel_is_named() -> dict[str, object]:
    modprobe("nvme")
    namespace_path(PEER)
    said = refusal(PathError, gpunvme.P2pMemory, PEER, 4096)
    assert "no P2PDMA" in said, said
    assert "there is no PCI device" in refusal(PathError, gpunvme.P2pMemory, "0000:7f:00.0", 4096)
    refusal(UriError, gpunvme.P2pMemory, "nonsense", 4096)
    with gpunvme.open(Path(namespace_path(PEER)), "r") as drive:
        verdicts = {verdict.path: verdict for verdict in drive.explain()}
    assert "gpunvme.P2pMemory" in verdicts["p2pdma"].reason, verdicts
    return {"said": said}
