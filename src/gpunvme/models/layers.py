"""`LayerLoader`: a model that is larger than the memory it runs in, layer by layer, read ahead of the computation."""

from __future__ import annotations

import itertools
import operator
import os
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Self

from gpunvme import many
from gpunvme.errors import BudgetError, Cancelled, Error, LayerError, PathError
from gpunvme.memory import CPU, Device
from gpunvme.models import residency
from gpunvme.models.grouping import Group, layers_of
from gpunvme.models.layer_layout import LayerLayout, allocate, memory_for
from gpunvme.models.layer_ring import HostCopy, Ring, Slot, StreamOrder
from gpunvme.models.layer_sources import OpenSource
from gpunvme.models.layer_stats import LayerStats
from gpunvme.streams import stream_handle
from gpunvme.transfer import format_bytes

# How often `close` stops what another thread waits for, in seconds.
_LOOK = 0.01


class Layer:
    """A layer in the consumer's hands, until the next one is asked for.

    Attributes
    ----------
    index, name
        Its place in a pass, and its name.
    nbytes
        Bytes of its tensors.
    tier
        Where it was: ``"device"``, ``"host"`` or ``"source"``; see `LayerStats`.
    """

    def __init__(self, loader: LayerLoader, layout: LayerLayout, tensors: dict[str, Any], tier: str) -> None:
        self.index = layout.index
        self.name = layout.name
        self.nbytes = layout.nbytes
        self.tier = tier
        self._loader = loader
        self._tensors: dict[str, Any] | None = tensors

    @property
    def tensors(self) -> dict[str, Any]:
        """Its tensors by name: views of a slot, which the next layers overwrite.

        Raises
        ------
        LayerError
            The layer was given back.
        """
        if self._tensors is None:
            raise LayerError(
                f"layer {self.name!r} was given back: it is valid until the next one is asked for; clone what you keep"
            )
        return self._tensors

    def release(self, stream: Any = None) -> None:
        """Give it back before the next one is asked for.

        Parameters
        ----------
        stream
            A CUDA stream whose kernels, queued so far, use it too.
        """
        if self._tensors is not None:
            self._loader._give_back(self, stream)

    def __repr__(self) -> str:
        return f"<gpunvme Layer {self.index} {self.name!r}, {format_bytes(self.nbytes)}, {self.tier}>"


class LayerLoader:
    """The layers of a model, one after another, through a ring of slots in a device's memory.

    While one layer is computed with, the next ones are read. ``for layer in loader`` is one pass; the first layers of
    the next pass are read while the last ones of this pass are computed with. ``loader[i]`` and ``loader[name]`` take
    any layer; layers taken by their number one after another are read ahead as well.

    One layer is in the consumer's hands at a time: asking for the next one gives it back. On a GPU this is in the order
    of streams: the slot is filled again behind the kernels that were queued when the layer was given back, on the
    stream that was current when it was taken and on the one that is current then.

    Parameters
    ----------
    source
        A checkpoint as `load_file` takes it (safetensors: file, shards, index, directory; GGUF); a `gpunvme.Catalog`,
        which stays open as long; or a `LayerSource`, or a mapping ``{name: (file, offset, nbytes, dtype, shape)}``, for
        plain files, raw namespaces and all else.
    device
        Where the layers shall be: ``"cpu"``, ``"cuda"``, ``"cuda:1"``, an int or a `torch.device`.
    slots
        Layers that are there at a time, the one in the consumer's hands included.
    group
        From a tensor's name to its layer, None to leave the tensor out; see `grouping.layers_of`, also for the
        default.
    budget_gpu
        Bytes of GPU memory in all: what the slots leave is used for layers that stay there. None: slots only.
    budget_host
        With a GPU: bytes of page-locked host memory for layers that stay there and are copied from it. Without: bytes
        of host memory in all, as ``budget_gpu``.
    repeat
        Whether another pass follows each pass, so that its first layers are read ahead.
    path
        Name of the path that must carry every transfer, or ``"auto"`` for the best one.
    framework
        ``"pt"`` for torch tensors, ``"np"`` for NumPy arrays, ``"buffer"`` for GPU memory as plain `Buffer` objects.
        None is torch where it is installed; else NumPy, or for a GPU ``"buffer"``.
    stream
        CUDA stream that the layers are computed with on. If None, the framework's current one at each step.
    timeout
        Seconds that reading one layer may take.

    Raises
    ------
    FormatError
        A checkpoint is not valid, or has a dtype that the framework lacks.
    BudgetError
        A budget is too small for the slots, or for any layer.
    RangeError
        An extent lies outside its file.
    CatalogChangedError
        A catalog was changed so often that its regions may have been overwritten.
    FileError, NvmeError, CudaError, SpanError, PathError
        As for `gpunvme.open` and `File.read_into`. What goes wrong while a layer is read ahead is raised when that
        layer is asked for; asking again tries again.

    Examples
    --------
    >>> with gpunvme.LayerLoader("model/", "cuda", budget_gpu=8 << 30) as loader:  # doctest: +SKIP
    ...     for token in tokens:
    ...         for layer in loader:
    ...             y = forward(layer.name, layer.tensors, y)
    ...     print(loader.stats())
    """

    def __init__(
        self,
        source: Any,
        device: Any = "cpu",
        *,
        slots: int = 2,
        group: Group | None = None,
        budget_gpu: int | None = None,
        budget_host: int | None = None,
        repeat: bool = True,
        path: str = "auto",
        framework: str | None = None,
        stream: Any = None,
        timeout: float | None = None,
    ) -> None:
        if operator.index(slots) < 1:
            raise ValueError(f"slots is {slots}: one at least, two to read ahead")
        self.device = where = Device.parse(device)
        if budget_gpu is not None and not where.is_gpu:
            raise BudgetError(f"budget_gpu={budget_gpu} is for a GPU; on {where} it is budget_host")
        self._memory = memory_for(framework, where)
        self._stream = stream
        self._repeat = repeat
        self._timeout = timeout
        self._process = os.getpid()
        self._lock = threading.RLock()
        self._stats = LayerStats()
        self._held: tuple[Layer, Slot | None, int | None, int] | None = None
        self._closing = False
        self._pass = 0
        self._last: int | None = None
        self._stay: dict[int, tuple[Any, dict[str, Any]]] = {}
        self._staying: StreamOrder | None = None  # behind the kernels that use what stays
        self._ring = Ring([], [], {}, None)
        self._source = OpenSource(source, path)
        try:
            self._layers = self._layouts(group)
            self._place(slots, budget_gpu if where.is_gpu else budget_host, budget_host if where.is_gpu else None)
        except BaseException:
            self.close()
            raise

    # --- set up

    def _layouts(self, group: Group | None) -> list[LayerLayout]:
        tensors = self._source.tensors
        files = {file: number for number, file in enumerate(dict.fromkeys(entry.file for entry in tensors.values()))}
        order = sorted(tensors, key=lambda name: (files[tensors[name].file], tensors[name].info.offset))
        return [
            LayerLayout(index, name, [tensors[each] for each in names], self._memory)
            for index, (name, names) in enumerate(layers_of(order, group).items())
        ]

    def _place(self, slots: int, budget: int | None, budget_host: int | None) -> None:
        """Allocate everything, and load what stays."""
        sizes = [layer.slot_bytes for layer in self._layers]
        name = "budget_gpu" if self.device.is_gpu else "budget_host"
        stay, slot_bytes = residency.plan(sizes, min(slots, len(sizes)), budget, name)
        rest = [layer.index for layer in self._layers if layer.index not in stay]
        stream = self._current_stream()
        made = []
        for _ in range(min(slots, len(rest))):
            memory = allocate(self._memory, slot_bytes, "a slot")
            made.append(Slot(memory, self._memory.address(memory), self.device, stream))
        copies: dict[int, HostCopy] = {}
        if budget_host is not None and rest:
            chosen = residency.spread(rest, sizes, budget_host)
            if not chosen:
                raise BudgetError(
                    f"budget_host={budget_host} is too small: the smallest layer takes "
                    f"{min(sizes[index] for index in rest)} bytes"
                )
            copies = {index: HostCopy(self._layers[index], self.device) for index in sorted(chosen)}
        self._rest = rest
        self._ring = Ring(made, self._layers, copies, self._timeout)
        self._load_what_stays(sorted(stay), copies, stream)

    def _load_what_stays(self, stay: list[int], copies: dict[int, HostCopy], stream: int | None) -> None:
        self._staying = StreamOrder(self.device)
        for index in stay:
            layer = self._layers[index]
            memory = allocate(self._memory, layer.slot_bytes, f"layer {layer.name!r}")
            self._stay[index] = memory, layer.tensors(memory)
        device, address = self.device, self._memory.address
        staying = ((index, address(memory), device, memory) for index, (memory, _) in self._stay.items())
        copied = ((index, copy.memory.address, CPU, copy.memory) for index, copy in copies.items())
        for index, base, where, owner in itertools.chain(staying, copied):
            layer = self._layers[index]
            if layer.runs:
                on = stream if where.is_gpu else None
                with _noted(layer):
                    try:
                        parts = layer.parts(base, where, owner)
                        self._stats.add(layer, many.read_many(parts, stream=on, timeout=self._timeout))
                    except PathError as error:
                        if where != device:
                            error.add_note("budget_host= keeps it in host memory: leave that out, or take path='auto'")
                        raise
        self._source.check()

    # --- what there is

    def __len__(self) -> int:
        return len(self._layers)

    @property
    def names(self) -> list[str]:
        """The layers' names, in the order of a pass."""
        return [layer.name for layer in self._layers]

    @property
    def nbytes(self) -> int:
        """Bytes of all layers' tensors."""
        return sum(layer.nbytes for layer in self._layers)

    def stats(self) -> LayerStats:
        """Return what was done so far."""
        now = self._stats
        paths = {name: Counter(each) for name, each in now.paths.items()}
        hits = Counter(now.hits)
        return LayerStats(
            now.layers, hits, now.read_bytes, now.copied_bytes, now.waited_seconds, paths, dict(now.reasons)
        )

    def __repr__(self) -> str:
        state = "closed" if self._closing else f"{len(self._stay)} stay on {self.device}, {len(self._ring.slots)} slots"
        return f"<gpunvme.LayerLoader of {len(self._layers)} layers, {format_bytes(self.nbytes)}; {state}>"

    # --- layers

    def __iter__(self) -> Iterator[Layer]:
        """Take every layer, in order, once.

        Raises
        ------
        LayerError
            Another pass was begun before this one came to its end, or another thread holds a layer.
        """
        with self._entered():
            self._pass += 1
            number = self._pass
        for index in range(len(self._layers)):
            yield self._take(index, number)
        with self._entered():
            self._release_held()

    def __getitem__(self, which: int | str) -> Layer:
        """Take one layer, by number or name.

        Raises
        ------
        IndexError, KeyError
            There is no such layer.
        LayerError
            The loader is closed, or another thread holds a layer.
        Error
            Whatever reading it failed with.
        """
        if isinstance(which, str):
            index = next((layer.index for layer in self._layers if layer.name == which), None)
            if index is None:
                raise KeyError(f"there is no layer {which!r}; there are: {', '.join(self.names)}")
        else:
            index = operator.index(which)
            if not -len(self._layers) <= index < len(self._layers):
                raise IndexError(f"there is no layer {index}; there are {len(self._layers)}")
        return self._take(index % len(self._layers), None)

    @contextmanager
    def _entered(self) -> Iterator[None]:
        """Refuse whoever must not come in now."""
        if os.getpid() != self._process:
            raise LayerError("the loader belongs to the parent process, its reads run only there: make one here")
        if not self._lock.acquire(blocking=False):
            raise LayerError("another thread is taking a layer; a loader has one consumer: make one for each")
        try:
            if self._closing:
                raise LayerError("the loader is closed")
            if self._held is not None and self._held[3] != threading.get_ident():
                raise LayerError(
                    f"another thread holds layer {self._held[0].name!r}: a loader has one consumer, which gives a "
                    "layer back by asking for the next one or by Layer.release()"
                )
            yield
        finally:
            self._lock.release()

    def _take(self, index: int, number: int | None) -> Layer:
        with self._entered():
            if number is not None and number != self._pass:
                raise LayerError(
                    "another pass was begun, or a layer taken: a loader has one consumer, make one for each"
                )
            self._release_held()
            if number is None:
                self._pass += 1  # a pass that was left must not go on behind random access
            wanted = self._next(index, in_order=number is not None or self._follows(index))
            self._last = index
            layer = self._layers[index]
            slot: Slot | None = None
            if index in self._stay:
                tensors, tier = self._stay[index][1], "device"
                self._ring.read_ahead(wanted, index)
            else:
                slot = self._ring.fetch(index)
                tier = slot.tier if slot.fresh else "device"
                self._await(slot, layer, wanted, fresh=slot.fresh)
                tensors = slot.tensors
            stream = self._current_stream()
            if slot is not None:
                slot.take(stream)
            taken = Layer(self, layer, dict(tensors), tier)
            self._held = taken, slot, stream, threading.get_ident()
            self._stats.layers += 1
            self._stats.hits[tier] += 1
            if tier == "host":
                self._stats.copied_bytes += layer.nbytes
            return taken

    def _await(self, slot: Slot, layer: LayerLayout, wanted: list[int], *, fresh: bool) -> None:
        start = time.perf_counter()
        try:
            with _noted(layer):
                transfer = self._ring.wait(slot, wanted)
                if transfer is not None and fresh:
                    self._source.check()
        except BaseException as error:
            self._ring.forget_ahead()
            if self._closing and isinstance(error, Cancelled):
                raise LayerError("the loader was closed while a layer was waited for") from error
            raise
        finally:
            self._stats.waited_seconds += time.perf_counter() - start
        if self._closing:
            raise LayerError("the loader was closed while a layer was waited for")
        if transfer is not None and fresh:
            self._stats.add(layer, transfer)

    def _follows(self, index: int) -> bool:
        last = -1 if self._last is None else self._last
        return index == (last + 1) % len(self._layers)

    def _next(self, index: int, *, in_order: bool) -> list[int]:
        """Return the layers that have to be in slots next, as far as there is room."""
        if not in_order or self._closing:
            return []
        room = len(self._ring.slots) - (index not in self._stay)
        behind = (each for each in self._rest if each > index)
        before = (each for each in self._rest if each < index) if self._repeat else ()
        return list(itertools.islice(itertools.chain(behind, before), room))

    def _current_stream(self) -> int | None:
        return stream_handle(self._stream, None, self.device)

    def _give_back(self, layer: Layer, stream: Any) -> None:
        with self._entered():
            if self._held is not None and self._held[0] is layer:
                self._release_held(stream_handle(stream, None, self.device) if stream is not None else None)

    def _release_held(self, *more: int | None) -> None:
        if self._held is None:
            return
        layer, slot, stream, _ = self._held
        self._held = None
        layer._tensors = None
        streams = [each for each in (stream, self._current_stream(), *more) if each is not None]
        if slot is not None:
            slot.release(*streams)
        elif self._staying is not None:
            self._staying.follow(*streams)

    # --- the end

    def close(self) -> None:
        """Give everything back: reads in flight are stopped, kernels that use a layer are waited for. Idempotent.

        Any thread may call it: a consumer that waits for a layer gets a `LayerError`.
        """
        self._closing = True
        if os.getpid() != self._process:  # reads, streams and namespaces are the parent's
            self._ring.abandon()
            self._stay.clear()
            return
        while not self._lock.acquire(timeout=_LOOK):  # a consumer in another thread is waiting for a read
            for slot in self._ring.slots:
                slot.cancel()
        try:
            try:
                self._release_held()
            except Error:
                pass  # the GPU has failed, and uses nothing any more
            self._ring.close()
            if self._staying is not None:
                self._staying.wait()
            self._stay.clear()
            self._source.close()
        finally:
            self._lock.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@contextmanager
def _noted(layer: LayerLayout) -> Iterator[None]:
    """Say in an error which layer was read."""
    try:
        yield
    except Error as error:
        error.add_note(f"while reading layer {layer.index} {layer.name!r}")
        raise
