"""A controller that misbehaves: the driver brings every byte all the same, or says exactly what it could not do."""

import threading
import time

import numpy as np
import pytest

import gpunvme
from files import contents
from gpunvme import nvme

SIZE = 1 << 20


def opened(faults="", *, timeout=0.3, seed=1, options="", **driver):
    uri = f"soft:ram?size={SIZE}&mdts=1{options}"
    uri += f"&faults={faults}&seed={seed}" if faults else ""
    return nvme.open(uri, timeout=timeout, admin_timeout=2, **driver)


@pytest.fixture
def disk():
    """A controller in good order, to be broken by `inject`."""
    with opened() as controller:
        namespace = controller.namespace()
        data = contents(SIZE)
        namespace.write_from(data)
        yield controller, namespace, data


HARMLESS = [
    "stale-phase@0.1",
    "delay:20@0.05",
    "reorder@0.5",
    "duplicate-cqe@0.3",
    "unknown-cid@0.3",
    "torn-cqe@0.1",
    "slow:1@0.2",
]
LOST = ["drop@0.02", "drop#5", "cq-stall#4"]


@pytest.mark.parametrize("fault", [*HARMLESS, ",".join(HARMLESS)])
def test_what_a_driver_must_bear_costs_nothing_but_time(disk, fault):
    controller, namespace, data = disk
    controller.timeout = 10
    controller.transport.controller.inject(fault, 3)
    assert namespace.read().numpy().tobytes() == data
    lbas = np.random.default_rng(1).integers(0, namespace.blocks, 300)
    rows = namespace.gather(lbas).numpy()
    assert [row.tobytes() for row in rows] == [data[lba * 512 : (lba + 1) * 512] for lba in lbas]
    injected = {k: v for k, v in controller.transport.controller.stats().items() if k.startswith("fault.") and v}
    assert injected
    assert controller.resets == 0


@pytest.mark.parametrize("fault", LOST)
def test_lost_completions_are_found_aborted_or_reset_and_repeated(disk, fault):
    controller, namespace, data = disk
    controller.transport.controller.inject(fault, 7)
    done = namespace.read_into(destination := bytearray(SIZE))
    assert destination == data
    assert controller.aborts + controller.resets > 0
    assert "tried again" in done.reason
    controller.transport.controller.inject("", 0)
    assert namespace.read().numpy().tobytes() == data


@pytest.mark.parametrize("fault", LOST)
def test_lost_writes_arrive_after_all(disk, fault):
    controller, namespace, _ = disk
    controller.transport.controller.inject(fault, 5)
    data = contents(SIZE, 2)
    namespace.write_from(data)
    controller.transport.controller.inject("", 0)
    assert namespace.read().numpy().tobytes() == data


def test_a_controller_that_answers_nothing_is_given_up_and_the_commands_are_named(disk):
    controller, namespace, data = disk
    controller.transport.controller.inject("drop", 1)
    with pytest.raises(gpunvme.CommandError, match="never answered") as caught:
        namespace.read(8, 4)
    (failed,) = caught.value.failures
    assert (failed.opcode, failed.lba, failed.blocks, failed.kind) == (2, 8, 4, "timeout")
    controller.transport.controller.inject("", 0)
    assert namespace.read().numpy().tobytes() == data


@pytest.mark.parametrize(("status", "sct", "sc"), [("0x281", 2, 0x81), ("0x004", 0, 4)])
def test_an_error_that_lasts_is_reported_with_every_command(disk, status, sct, sc):
    controller, namespace, _ = disk
    controller.transport.controller.inject(f"error:{status}!#3,error:{status}!#5", 1)
    with pytest.raises(gpunvme.CommandError) as caught:
        namespace.read_into(bytearray(SIZE))
    assert {(each.sct, each.sc, each.dnr, each.kind) for each in caught.value.failures} == {(sct, sc, True, "status")}
    assert all(each.blocks == 16 and each.lba % 16 == 0 for each in caught.value.failures)


def test_an_error_that_passes_is_tried_again(disk):
    controller, namespace, data = disk
    controller.transport.controller.inject("error:0x004#2,error:0x082#9", 1)
    done = namespace.read_into(destination := bytearray(SIZE))
    assert destination == data
    assert "2 tried again" in done.reason


def test_an_error_that_passes_but_comes_back_is_reported_in_the_end(disk):
    controller, namespace, _ = disk
    controller.transport.controller.inject("error:0x004", 1)
    with pytest.raises(gpunvme.CommandError) as caught:
        namespace.read(0, 1)
    assert [(each.sct, each.sc, each.dnr) for each in caught.value.failures] == [(0, 4, False)]


@pytest.mark.parametrize("when", [1, 10])
def test_a_controller_that_fails_is_reset_and_the_transfer_goes_on(disk, when):
    controller, namespace, data = disk
    controller.transport.controller.inject(f"cfs#{when}", 1)
    assert namespace.read().numpy().tobytes() == data
    assert controller.resets == 1


def test_a_controller_that_is_gone_ends_every_transfer_soon(disk):
    controller, namespace, _ = disk
    controller.transport.controller.inject("device-gone#3", 1)
    with pytest.raises(gpunvme.ControllerError, match=r"gone|could not be reset"):
        namespace.read_into(bytearray(SIZE))
    with pytest.raises(gpunvme.ControllerError):
        namespace.read(0, 1)
    controller.close()


def test_a_reset_in_the_middle_concerns_every_thread(disk):
    controller, namespace, data = disk
    errors, ended = [], threading.Event()

    def read():
        try:
            while not ended.is_set():
                assert namespace.read().numpy().tobytes() == data
        except BaseException as error:  # noqa: BLE001
            errors.append(error)

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for _ in range(20):
        controller.reset()
        time.sleep(0.005)
    ended.set()
    for thread in threads:
        thread.join(60)
    assert not errors
    assert not any(thread.is_alive() for thread in threads)


def test_a_transfer_ends_at_its_deadline_even_if_the_controller_does_not_answer(disk):
    controller, namespace, data = disk
    controller.transport.controller.inject("drop", 1)
    with pytest.raises((gpunvme.DeadlineExceeded, gpunvme.CommandError)):
        namespace.read_into(bytearray(SIZE), timeout=0.1)
    controller.transport.controller.inject("", 0)
    assert namespace.read().numpy().tobytes() == data


def test_a_transfer_can_be_cancelled(disk):
    controller, namespace, data = disk
    controller.transport.controller.inject("slow:5", 1)
    job = namespace.read_into(bytearray(SIZE), wait=False)
    job.cancel()
    with pytest.raises(gpunvme.Cancelled):
        job.wait(30)
    controller.transport.controller.inject("", 0)
    assert namespace.read().numpy().tobytes() == data


def test_closing_a_controller_ends_transfers_in_flight(disk):
    controller, namespace, _ = disk
    controller.transport.controller.inject("slow:20", 1)
    job = namespace.read_into(bytearray(SIZE), wait=False)
    controller.close()
    with pytest.raises(ValueError, match="closed"):
        job.wait(30)


def test_memory_of_a_transfer_that_failed_is_out_of_the_controllers_reach(disk):
    """A late write into freed memory would corrupt whatever came to be there."""
    controller, namespace, _ = disk
    destination = np.zeros(SIZE, np.uint8)
    controller.transport.controller.inject("delay:200,reorder", 1)
    with pytest.raises((gpunvme.DeadlineExceeded, gpunvme.CommandError)):
        namespace.read_into(destination, timeout=0.02)
    destination[:] = 7
    time.sleep(0.5)
    assert (destination == 7).all()


@pytest.mark.parametrize("queues", [1, 4])
def test_every_fault_at_once_and_still_every_byte(queues):
    mixed = "delay:2@0.02,reorder@0.2,drop@0.002,duplicate-cqe@0.05,unknown-cid@0.05,torn-cqe@0.02,error:0x004@0.005"
    with opened(timeout=0.25, options="&threads=2", queues=queues) as controller:
        namespace = controller.namespace()
        data = contents(SIZE)
        namespace.write_from(data)
        controller.transport.controller.inject(mixed, 11)
        for _ in range(5):
            assert namespace.read().numpy().tobytes() == data
        assert controller.transport.controller.dma_faults() == []
