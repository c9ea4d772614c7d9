"""Queues in a controller's care that someone else drives, as GPU queues are. If this failed, a reset would leave them
dead, or a closed controller would still write into their memory."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import gpunvme
from gpunvme import nvme
from gpunvme.nvme import spec
from gpunvme.nvme.controller import Controller
from gpunvme.nvme.queues import QueuePair


class Guest:
    """Makes its queues and says what it was told."""

    def __init__(self, controller: Controller, count: int) -> None:
        self.controller = controller
        self.ids = controller.take_queue_ids(count)
        self.pairs = [
            QueuePair(queue_id, 16, controller.transport, controller.command, controller.page_bytes)
            for queue_id in self.ids
        ]
        self.told: list[str] = []

    def make_queues(self) -> None:
        self.told.append("make")
        for pair in self.pairs:
            pair.create()

    def leave_queues(self) -> None:
        self.told.append("leave")

    def close(self) -> None:
        self.told.append("close")
        for pair in self.pairs:
            pair.remove()
        self.controller.give_queue_ids(self.ids)
        self.controller.dismiss(self)
        self.free()

    def free(self) -> None:
        self.told.append("free")
        for pair in self.pairs:
            pair.free()


@pytest.fixture
def controller() -> Iterator[Controller]:
    with nvme.open("soft:ram?size=1MiB&queues=8", queues=2) as opened:
        yield opened


def test_guests_get_the_queues_that_the_driver_leaves(controller: Controller) -> None:
    assert controller.take_queue_ids(4) == [3, 4, 5, 6]
    assert controller.take_queue_ids(4) == [7, 8]
    assert controller.take_queue_ids(4) == []
    controller.give_queue_ids([4, 8])
    assert controller.take_queue_ids(4) == [4, 8]


def test_a_guest_survives_resets_and_is_closed_with_the_controller(controller: Controller) -> None:
    guest = Guest(controller, 3)
    controller.admit(guest)
    assert guest.told == ["make"]
    controller.reset()
    assert guest.told == ["make", "leave", "make"]
    # The controller has them: a second one of that number is refused.
    with pytest.raises(gpunvme.CommandError):
        controller.command(spec.AdminOpcode.CREATE_IO_CQ, prp1=guest.pairs[0].completions.iova(), cdw=(15 << 16 | 3, 1))
    controller.close()
    assert guest.told == ["make", "leave", "make", "close", "free"]


def test_a_guest_that_has_left_hears_nothing_more(controller: Controller) -> None:
    guest = Guest(controller, 1)
    controller.admit(guest)
    guest.close()
    controller.reset()
    controller.close()
    assert guest.told == ["make", "close", "free"]


def test_a_guests_memory_is_freed_when_a_controller_is_gone_for_good(controller: Controller) -> None:
    guest = Guest(controller, 1)
    controller.admit(guest)
    controller.transport.controller.inject("device-gone", 1)  # type: ignore[attr-defined]
    with pytest.raises(gpunvme.NvmeError):
        controller.namespace().read(0, 1)

    def close() -> None:
        guest.told.append("close")  # its queues cannot be deleted: it stays a guest

    guest.close = close  # type: ignore[method-assign]
    controller.close()
    assert guest.told[-2:] == ["close", "free"]
