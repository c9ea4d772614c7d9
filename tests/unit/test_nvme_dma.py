"""IOVAs: two pieces of memory must never share one."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpunvme.nvme.dma import PAGE, DmaMemory, IovaSpace, page_range


@given(st.lists(st.tuples(st.integers(1, 9 * PAGE), st.sampled_from([PAGE, 4 * PAGE, 16 * PAGE]), st.booleans())))
def test_ranges_handed_out_never_overlap_and_all_come_back(steps):
    space = IovaSpace([(3 * PAGE, 200 * PAGE), (300 * PAGE, 310 * PAGE)])
    taken = []
    for nbytes, align, give in steps:
        if give and taken:
            space.give(*taken.pop(len(taken) // 2))
            continue
        try:
            iova = space.take(nbytes, align)
        except MemoryError:
            continue
        end = iova + -(-nbytes // PAGE) * PAGE
        assert iova % align == 0
        assert (iova >= 3 * PAGE and end <= 200 * PAGE) or (iova >= 300 * PAGE and end <= 310 * PAGE)
        assert all(end <= other or other + -(-size // PAGE) * PAGE <= iova for other, size in taken)
        taken.append((iova, nbytes))
    for iova, nbytes in taken:
        space.give(iova, nbytes)
    assert space.take(197 * PAGE) == 3 * PAGE  # it has grown together again
    assert space.take(10 * PAGE) == 300 * PAGE


def test_a_space_that_is_full_says_so():
    space = IovaSpace([(0, 4 * PAGE)])
    space.take(3 * PAGE)
    with pytest.raises(MemoryError, match="IOVAs"):
        space.take(2 * PAGE)


@given(st.integers(1, 1 << 40), st.integers(1, 1 << 20))
def test_whole_pages_hold_the_range_and_little_more(address, nbytes):
    start, size = page_range(address, nbytes)
    assert start % PAGE == 0
    assert size % PAGE == 0
    assert start <= address < start + PAGE
    assert address + nbytes <= start + size < address + nbytes + PAGE


def test_scattered_pages_have_iovas_of_their_own():
    memory = np.zeros(4 * PAGE, np.uint8)
    pages = np.array([0x7000, 0x2000, 0x9000, 0x1000], np.uint64)
    scattered = DmaMemory(memory.ctypes.data, memory.nbytes, pages, owner=memory)
    assert not scattered.contiguous
    assert [scattered.iova(offset) for offset in (0, 5, PAGE, 2 * PAGE + 7)] == [0x7000, 0x7005, 0x2000, 0x9007]
    assert scattered.page_iovas(PAGE, 2, PAGE).tolist() == [0x2000, 0x9000]


def test_memory_is_given_back_once():
    given_back = []
    memory = np.zeros(PAGE, np.uint8)
    with DmaMemory(memory.ctypes.data, PAGE, 0x1000, lambda: given_back.append(1), memory) as dma:
        dma.view()[3] = 7
        with pytest.raises(ValueError, match="outside"):
            dma.view(PAGE - 1, 2)
    dma.close()
    assert memory[3] == 7
    assert given_back == [1]
