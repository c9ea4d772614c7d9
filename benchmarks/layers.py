"""A Llama-shaped model in a third of its size of GPU memory: token after token, each a pass over all layers.

Everybody keeps as many layers in GPU memory as the budget allows. The limit is what page-locked memory can be copied
at: the bytes of the other layers by that rate, the computation for nothing. The model is in the page cache.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from typing import Any

import gpunvme
from gpunvme import _native
from gpunvme.bench import machine, page_cache
from gpunvme.bench.contest import Contestant, Kind, Run, WrongBytes
from session import GIB, Session, options, size

LIMITS = "limits"
# Copies that the limit is measured with, of this size together.
CEILING_BYTES = 1 << 30


def main() -> None:
    parser = options(__doc__ or "", deadline=100, rounds=3)
    parser.add_argument("--size", type=size, default=6 * GIB, help="of the model (default: 6GiB)")
    parser.add_argument("--tokens", type=int, default=3, help="a run (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=8, help="texts at once (default: %(default)s)")
    parser.add_argument("--slots", type=int, default=2, help="of the loader (default: %(default)s)")
    parser.add_argument("--device", default="cuda:0", help="cpu: to see that it works (default: %(default)s)")
    arguments = parser.parse_args()
    import torch

    nbytes = arguments.size // (8 if arguments.quick else 1)
    with Session("layers", arguments) as session, torch.inference_mode():
        model = Model(session, nbytes, arguments)
        model.hold_contests(session)


class Model:
    """The files of the model, and every way to compute with it."""

    def __init__(self, session: Session, nbytes: int, arguments: Any) -> None:
        import torch

        from llama import Shape

        self.torch = torch
        self.device: str = arguments.device
        self.gpu = self.device != "cpu"
        self.tokens: int = arguments.tokens
        self.batch: int = arguments.batch
        self.slots: int = arguments.slots
        shape = Shape.of_size(nbytes)
        self.paths = shape.save(session.directory(nbytes), self.device)
        for path in self.paths:
            session.removed_at_the_end(path)
        session.result["file"] = machine.describe_file(str(self.paths[0]))
        session.result["model"] = shape._asdict()
        if self.gpu:
            session.result["machine"]["gpu"] = torch.cuda.get_device_name(self.device)
        session.result["contestants"]["gpunvme"] = {"version": gpunvme.__version__}
        with gpunvme.LayerLoader(self.paths, self.device, slots=1) as loader:
            self.names = loader.names
            self.layers = [layer.nbytes for layer in loader._layers]
            self.nbytes = loader.nbytes
        self.budget = self.nbytes // 3
        self.staying = self._staying()
        self.moved = self.nbytes - sum(self.layers[index] for index in self.staying)
        self.expected = self._expected()

    def _staying(self) -> set[int]:
        """Return which layers the loader keeps under the budget: the others keep the same."""
        budget: dict[str, int] = {"budget_gpu" if self.gpu else "budget_host": self.budget}
        with gpunvme.LayerLoader(self.paths, self.device, slots=self.slots, **budget) as loader:
            return set(loader._stay)

    def _expected(self) -> Any:
        """Return the first token's logits of the model that is loaded as a whole."""
        whole = gpunvme.load_file(self.paths, device=self.device)
        decoder = self.decoder()
        decoder.step((name, whole) for name in self.names)
        logits = decoder.logits.cpu()
        del whole, decoder
        self.clean()
        return logits

    def decoder(self) -> Any:
        from llama import Decoder

        return Decoder(self.batch, self.device)

    def clean(self) -> None:
        gc.collect()
        if self.gpu:
            self.torch.cuda.empty_cache()

    def bring(self) -> float | None:
        """Have the model in the page cache."""
        shares = [page_cache.bring(str(path), "hot", path.stat().st_size) for path in self.paths]
        return None if None in shares else min(share or 0.0 for share in shares)

    # ---- contests

    def hold_contests(self, session: Session) -> None:
        limit = Contestant("page-locked copies of what is not there", "limit", self.ceiling, lands=False)
        if not self.gpu:
            limit = Contestant("nothing", "limit", lambda: Run(float("inf"), 1), lands=False)
        files = "a third in GPU memory, the rest in files"
        rows = session.hold(
            files,
            [
                self.contestant("gpunvme", "ours", self.by_loader, f"LayerLoader, {self.slots} slots"),
                self.contestant("safetensors, mmap", "peer", self.by_mmap, "safe_open, get_tensor for each layer"),
                self.contestant("CPU offload", "peer", self.by_offload, "pageable tensors, .to() for each layer"),
                limit,
            ],
            self.bring,
            seconds=60,
        )
        session.target(files, "limit", 0.9)
        session.target(files, "safetensors, mmap", 5)
        session.result["tokens_per_second"] = {
            row["contestant"]: row["median"] / self.nbytes for row in rows if row["median"]
        }
        if self.gpu:
            locked = "a third in GPU memory, the rest in page-locked memory"
            session.hold(
                locked,
                [
                    self.contestant("gpunvme", "ours", self.by_host_copies, "LayerLoader, budget_host="),
                    self.contestant("CPU offload", "peer", self.by_pinned_offload, "pinned tensors, .to() each layer"),
                    limit,
                ],
                self.bring,
                seconds=60,
            )
            session.target(locked, "limit", 0.9)
        for name, rate in session.result["tokens_per_second"].items():
            print(f"  {name:44s} {rate:.2f} tokens/s for each of {self.batch} texts")

    def contestant(self, name: str, kind: Kind, way: Callable[[], Iterator[Any]], settings: str) -> Contestant:
        """Let a way take part: setting it up is not timed, every token is.

        ``way`` yields functions that return the layers of a pass, and cleans up when it is closed.
        """

        def run() -> Run:
            self.clean()
            opened = way()
            try:
                layers, report = next(opened)
                decoder = self.decoder()
                decoder.step(layers())  # memory and kernels are there from here on
                self.check(decoder.logits)
                self.synchronize()
                start = time.perf_counter()
                for _ in range(self.tokens):
                    decoder.step(layers())
                self.synchronize()
                seconds = time.perf_counter() - start
                path, reason = report()
            finally:
                opened.close()
                self.clean()
            return Run(seconds, self.tokens * self.nbytes, path, reason)

        return Contestant(name, kind, run, settings=settings, lands=False)

    def synchronize(self) -> None:
        if self.gpu:
            self.torch.cuda.synchronize(self.device)

    def check(self, logits: Any) -> None:
        """Compare with the whole model; kernels may be others for memory that is aligned otherwise."""
        if not self.torch.allclose(logits.cpu().float(), self.expected.float(), rtol=0.05, atol=0.05):
            raise WrongBytes("the first token is not that of the whole model")

    def ceiling(self) -> Run:
        rate = _native.h2d_ceiling(int(self.device.partition(":")[2] or 0), CEILING_BYTES)
        return Run(self.moved / rate, self.nbytes, "", "the bytes of layers that are not there, at this rate")

    # ---- ways

    def by_loader(self, **options: Any) -> Iterator[Any]:
        budget: dict[str, Any] = {"budget_gpu" if self.gpu else "budget_host": self.budget}
        with gpunvme.LayerLoader(self.paths, self.device, slots=self.slots, **budget, **options) as loader:

            def layers() -> Iterator[Any]:
                return ((layer.name, layer.tensors) for layer in loader)

            def report() -> tuple[str, str]:
                stats = loader.stats()
                ways = sorted({path for paths in stats.paths.values() for path in paths})
                return ", ".join(ways), str(stats)

            yield layers, report

    def by_host_copies(self) -> Iterator[Any]:
        return self.by_loader(budget_host=2 * self.nbytes)

    def by_mmap(self) -> Iterator[Any]:
        from safetensors import safe_open

        files = [safe_open(path, framework="pt", device=self.device) for path in self.paths]
        where = {name: file for file in files for name in file.keys()}  # noqa: SIM118 - it is a method of the library's
        yield self._kept(lambda name: where[name].get_tensor(name), list(where)), lambda: ("mmap", "")

    def by_offload(self) -> Iterator[Any]:
        return self._offload(lambda tensor: tensor)

    def by_pinned_offload(self) -> Iterator[Any]:
        return self._offload(lambda tensor: tensor.pin_memory())

    def _offload(self, hold: Callable[[Any], Any]) -> Iterator[Any]:
        host = {name: hold(tensor) for name, tensor in gpunvme.load_file(self.paths).items()}
        yield (
            self._kept(lambda name: host[name].to(self.device, non_blocking=True), list(host)),
            lambda: ("cudaMemcpyAsync", ""),
        )
        host.clear()

    def _kept(self, fetch: Callable[[str], Any], names: list[str]) -> Callable[[], Iterator[Any]]:
        """Return passes of somebody who fetches the layers that are not kept in GPU memory."""
        from gpunvme.models.grouping import layers_of

        members = layers_of(names)
        kept = {layer: {name: fetch(name) for name in members[layer]} for layer in self._kept_names()}

        def layers() -> Iterator[Any]:
            for layer in self.names:
                yield layer, kept.get(layer) or {name: fetch(name) for name in members[layer]}

        return layers

    def _kept_names(self) -> list[str]:
        return [self.names[index] for index in sorted(self.staying)]


if __name__ == "__main__":
    main()
