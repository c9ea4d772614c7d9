"""Bringing a controller up and down, and what it says of itself: without this nothing else works."""

import itertools

import pytest

import files
import gpunvme
from files import contents
from gpunvme import nvme
from gpunvme.nvme import spec


def test_a_controller_says_who_it_is():
    with nvme.open("soft:ram?size=8MiB&serial=S123") as controller:
        assert controller.info.sn == "S123"
        assert controller.identify() == controller.info
        assert controller.namespace_ids() == [1]
        assert controller.registers.vs.mjr >= 2
        namespace = controller.namespace()
        assert (namespace.blocks, namespace.block_size, namespace.size) == (16384, 512, 8 << 20)


@pytest.mark.parametrize(
    "options",
    [
        "dstrd=0",
        "dstrd=1",
        "dstrd=5",
        "mpsmin=1",
        "mpsmin=4&mpsmax=4",
        "cqr=0",
        "mdts=0",
        "mdts=1",
        "mqes=2",
        "mqes=3",
        "mqes=5",
        "queues=1",
        "queues=3",
        "lba=4096",
        "threads=3",
        "vwc=0",
        "to=2",
    ],
)
def test_every_shape_of_controller_reads_what_was_written(options):
    data = contents(1 << 20)
    with nvme.open(f"soft:ram?size=2MiB&{options}", timeout=20) as controller:
        namespace = controller.namespace()
        namespace.write_from(data, 256 * 512 // namespace.block_size)
        assert (
            namespace.read(256 * 512 // namespace.block_size, len(data) // namespace.block_size).numpy().tobytes()
            == data
        )
        assert not any(namespace.read(0, 1).numpy())


def test_a_small_mqes_limits_queues_and_mdts_limits_commands():
    with nvme.open("soft:ram?size=1MiB&mqes=5&mdts=1") as controller:
        assert controller.registers.cap.queue_entries == 5
        assert controller.max_bytes == 8192
        done = controller.namespace().read_into(bytearray(1 << 20))
        assert done.reason.startswith("128 commands")


def test_fewer_queues_than_wanted_are_enough():
    with nvme.open("soft:ram?size=1MiB&queues=2", queues=16) as controller:
        assert len(controller.io_queues) == 2


def test_several_namespaces_are_apart():
    with nvme.open("soft:ram?size=4MiB&namespaces=4") as controller:
        assert controller.namespace_ids() == [1, 2, 3, 4]
        written = {each.nsid: contents(1 << 20, each.nsid) for each in controller.namespaces()}
        for each in controller.namespaces():
            assert each.size == 1 << 20
            each.write_from(written[each.nsid])
        for each in controller.namespaces():
            assert each.read().numpy().tobytes() == written[each.nsid]


def test_a_namespace_that_is_not_there_is_refused_with_those_that_are():
    refusal = pytest.raises(gpunvme.NvmeError, match="no active namespace 7; there are: 1, 2")
    with nvme.open("soft:ram?size=1MiB&namespaces=2") as controller, refusal:
        controller.namespace(7)


def test_features_can_be_read_and_set():
    with nvme.open("soft:ram?size=1MiB") as controller:
        assert controller.get_feature(spec.Feature.VOLATILE_WRITE_CACHE) & 1 == 1
        controller.set_feature(spec.Feature.VOLATILE_WRITE_CACHE, 0)
        assert controller.get_feature(spec.Feature.VOLATILE_WRITE_CACHE) & 1 == 0
        with pytest.raises(gpunvme.CommandError) as caught:
            controller.get_feature(0xBF)
        (failed,) = caught.value.failures
        assert (failed.sct, failed.sc, failed.dnr) == (0, 0x02, True)  # Invalid Field in Command


def test_log_pages_tell_of_use_and_errors():
    with nvme.open("soft:ram?size=1MiB") as controller:
        namespace = controller.namespace()
        namespace.read()
        log = controller.smart()
        assert log.host_read_commands > 0
        assert controller.error_log() is not None
        assert controller.firmware_log().active_slot == 1
        with pytest.raises(ValueError, match="multiples of 4"):
            controller.log_page(spec.LogPage.SMART, 513)


def test_an_invalid_doorbell_is_reported_as_an_event():
    with nvme.open("soft:ram?size=1MiB", queues=1, depth=16) as controller:
        assert controller.events() == []
        # A tail outside of the queue: what a driver that has lost count would write.
        controller.transport.write_register(spec.Register.DOORBELLS + 8, 4, 4000)
        events = _first_events(controller)
        assert events[0].type == spec.EventType.ERROR
        assert events[0].information == spec.ErrorEvent.INVALID_DOORBELL_VALUE


def _first_events(controller):
    for _ in itertools.repeat(None, 2000):
        if events := controller.events():
            return events
        controller.registers.check_alive()
    raise AssertionError("no event came")


def test_a_reset_loses_no_data_and_the_queues_come_back():
    data = contents(65536)
    with nvme.open("soft:ram?size=1MiB") as controller:
        namespace = controller.namespace()
        namespace.write_from(data)
        epoch = controller.epoch
        controller.reset()
        assert controller.epoch == epoch + 1
        assert namespace.read(0, 128).numpy().tobytes() == data


def test_aborting_a_command_that_is_not_there_says_so():
    with nvme.open("soft:ram?size=1MiB") as controller:
        assert controller.abort(1, 77) is False


def test_a_closed_controller_refuses_work():
    controller = nvme.open("soft:ram?size=1MiB")
    namespace = controller.namespace()
    controller.close()
    controller.close()
    for use in (namespace.read, controller.smart, namespace.flush, lambda: controller.buffer(10)):
        with pytest.raises(ValueError, match="is closed"):
            use()


def test_a_controller_that_does_not_answer_is_closed_all_the_same(tmp_path):
    uri = f"soft:{tmp_path / 'image'}?size=1MiB"
    controller = nvme.open(uri, queues=2, admin_timeout=0.05)
    controller.transport.controller.inject("slow:600000", 1)  # nothing is answered any more
    controller.close()
    nvme.open(uri).close()  # it has let go of the image


def test_a_buffer_outlives_its_controller():
    with nvme.open("soft:ram?size=1MiB") as controller:
        buffer = controller.buffer(8192)
        controller.namespace().read_into(buffer)
    buffer.numpy()[:] = 5
    assert bytes(buffer.numpy()[:3]) == b"\5\5\5"


def test_a_controller_that_is_ready_in_time_is_waited_for():
    with nvme.open("soft:ram?size=1MiB&to=20&faults=short-ready:100") as controller:
        assert controller.namespace().blocks == 2048


def test_a_controller_that_never_gets_ready_is_given_up():
    with pytest.raises(gpunvme.ControllerError, match=r"CSTS\.RDY is still 0, 0\.5 s after it was enabled"):
        nvme.open("soft:ram?size=1MiB&to=1&faults=short-ready:60000")


@pytest.mark.parametrize(
    ("uri", "reason"),
    [
        ("soft:ram", "needs a size"),
        ("soft:ram?size=0", "size"),
        ("soft:ram?size=1000", "whole number of blocks"),
        ("soft:ram?size=1MiB&lba=513", "lba"),
        ("soft:ram?size=1MiB&queues=0", "queues"),
        ("soft:ram?size=1MiB&mqes=1", "mqes"),
        ("soft:ram?size=1MiB&dstrd=16", "dstrd"),
        ("soft:ram?size=1MiB&namespaces=0", "namespaces"),
        ("soft:ram?size=1MiB&faults=explode", "explode"),
        ("soft:ram?size=1MiB&faults=drop@2", "drop@2"),
    ],
)
def test_a_controller_that_cannot_be_is_refused(uri, reason):
    with pytest.raises(gpunvme.Error, match=reason):
        nvme.open(uri)


def test_all_controllers_are_closed_at_exit_whatever_closing_one_raises() -> None:
    """A controller that is left running goes on with DMA into memory that is nobody's any more."""
    program = """
from gpunvme import nvme
controllers = [nvme.open("soft:ram?size=1MiB") for _ in range(3)]
closed = []
for number, controller in enumerate(controllers):
    close = controller.close
    def closing(number=number, close=close):
        close()
        closed.append(number)
        if number != 1:
            raise RuntimeError(f"trouble with {number}")
    controller.close = closing
from gpunvme.nvme.controller import _close_all
try:
    _close_all()
except ExceptionGroup as group:
    print(sorted(closed), sorted(map(str, group.exceptions)))
"""
    assert files.output(program) == "[0, 1, 2] ['trouble with 0', 'trouble with 2']\n"
