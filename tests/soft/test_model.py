"""Any stream of commands, on a controller of any shape, does what a plain array of bytes would do."""

from __future__ import annotations

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from files import contents
from gpunvme import nvme

SIZE = 1 << 20


class Disk(RuleBasedStateMachine):
    """A namespace and its model."""

    def __init__(self) -> None:
        super().__init__()
        self.controller: nvme.Controller | None = None

    @initialize(
        lba=st.sampled_from([512, 4096]),
        mdts=st.integers(0, 4),
        dstrd=st.integers(0, 3),
        mqes=st.sampled_from([2, 3, 7, 64, 1000]),
        queues=st.integers(1, 4),
        threads=st.integers(1, 3),
        mpsmin=st.sampled_from([0, 0, 1, 4]),
        faults=st.sampled_from(["", "reorder@0.3,delay:1@0.05", "duplicate-cqe@0.2,unknown-cid@0.1,torn-cqe@0.1"]),
        seed=st.integers(0, 1000),
    )
    def open(self, lba, mdts, dstrd, mqes, queues, threads, mpsmin, faults, seed) -> None:
        uri = f"soft:ram?size={SIZE}&lba={lba}&mdts={mdts}&dstrd={dstrd}&mqes={mqes}&queues={queues}&threads={threads}"
        uri += f"&mpsmin={mpsmin}&mpsmax={mpsmin}" + (f"&faults={faults}&seed={seed}" if faults else "")
        self.controller = nvme.open(uri, timeout=30)
        self.namespace = self.controller.namespace()
        self.block = lba
        self.model = bytearray(SIZE)

    def _range(self, at: float, share: float) -> tuple[int, int]:
        blocks = self.namespace.blocks
        lba = int(at * blocks)
        return lba, int(share * share * (blocks - lba))

    @rule(at=st.floats(0, 1), share=st.floats(0, 1), seed=st.integers(0, 99), skew=st.integers(0, 9), fua=st.booleans())
    def write(self, at, share, seed, skew, fua) -> None:
        lba, blocks = self._range(at, share)
        source = np.frombuffer(contents(blocks * self.block + skew, seed), np.uint8)[skew:]
        self.namespace.write_from(source, lba, fua=fua)
        self.model[lba * self.block : (lba + blocks) * self.block] = source.tobytes()

    @rule(at=st.floats(0, 1), share=st.floats(0, 1), skew=st.integers(0, 9))
    def read(self, at, share, skew) -> None:
        lba, blocks = self._range(at, share)
        destination = np.zeros(blocks * self.block + skew, np.uint8)
        self.namespace.read_into(destination[skew:], lba)
        assert destination[skew:].tobytes() == self.model[lba * self.block : (lba + blocks) * self.block]
        assert not destination[:skew].any()

    @rule(seed=st.integers(0, 99), count=st.integers(0, 60), blocks=st.integers(1, 9))
    def gather(self, seed, count, blocks) -> None:
        lbas = np.random.default_rng(seed).integers(0, self.namespace.blocks - blocks, count)
        rows = self.namespace.gather(lbas, blocks).numpy()
        for row, lba in zip(rows, lbas, strict=True):
            assert row.tobytes() == self.model[lba * self.block : (lba + blocks) * self.block]

    @rule(at=st.floats(0, 1), cuts=st.lists(st.integers(0, 9000), max_size=8), write=st.booleans())
    def pieces(self, at, cuts, write) -> None:
        total = -(-sum(cuts) // self.block) * self.block
        if total > SIZE // 2:
            return
        lba = int(at * (self.namespace.blocks - total // self.block))
        pieces = [np.zeros(size, np.uint8) for size in (*cuts, total - sum(cuts))]
        place = slice(lba * self.block, lba * self.block + total)
        if write:
            for number, piece in enumerate(pieces):
                piece[:] = np.frombuffer(contents(len(piece), number), np.uint8)
            self.namespace.write_pieces(pieces, lba)
            self.model[place] = b"".join(piece.tobytes() for piece in pieces)
        else:
            self.namespace.read_pieces(pieces, lba)
            assert b"".join(piece.tobytes() for piece in pieces) == self.model[place]

    @rule(at=st.floats(0, 1), share=st.floats(0, 1), deallocate=st.booleans())
    def write_zeroes(self, at, share, deallocate) -> None:
        lba, blocks = self._range(at, share)
        self.namespace.write_zeroes(lba, blocks, deallocate=deallocate)
        self.model[lba * self.block : (lba + blocks) * self.block] = bytes(blocks * self.block)

    @rule()
    def flush(self) -> None:
        self.namespace.flush()

    @rule()
    def reset(self) -> None:
        assert self.controller is not None
        self.controller.reset()

    @invariant()
    def no_stray_access(self) -> None:
        if self.controller is not None:
            assert self.controller.transport.controller.dma_faults() == []

    def teardown(self) -> None:
        if self.controller is not None:
            everything = self.namespace.read().numpy().tobytes()
            self.controller.close()
            assert everything == self.model


TestDisk = Disk.TestCase
TestDisk.settings = settings(
    settings.get_profile("any"), max_examples=settings().max_examples // 2, stateful_step_count=20
)
