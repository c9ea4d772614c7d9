"""The specification's numbers. If these failed, driver and controller would misunderstand each other, or a hostile
controller could do more than be refused."""

from __future__ import annotations

import re
from pathlib import Path
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpunvme import _native
from gpunvme.errors import ControllerError
from gpunvme.nvme import identify, logs, spec, status
from gpunvme.nvme.spec.layout import Layout, Structure

HEADERS = Path(__file__).parents[2] / "native" / "include" / "gpunvme"
ENUMS = [
    *(spec.Register, spec.AdminOpcode, spec.NvmOpcode, spec.Cns, spec.Csi, spec.Feature, spec.LogPage),
    *(spec.EventType, spec.ErrorEvent, spec.CcCss, spec.Shutdown, spec.ShutdownStatus, spec.Rw, spec.Dsm),
    *(spec.CreateQueue, identify.Oncs, identify.Nidt, logs.SmartWarning),
    *(status.Status, status.StatusType, status.StatusFlag),
]
BITS = [spec.Cap, spec.Version, spec.Cc, spec.Csts, spec.Aqa, spec.AsyncEvent]
SHOWN = [spec.Bpinfo, spec.Cmbloc, spec.Cmbsz, spec.Cmbmsc, spec.Cmbsts, spec.Crto, spec.Pmrcap, spec.Pmrsts]
STRUCTURES: list[type[Structure]] = [
    *(identify.IdentifyController, identify.PowerState, identify.IdentifyNamespace, identify.LbaFormat),
    *(logs.SmartLog, logs.ErrorLogEntry, logs.FirmwareSlotLog),
]
NUMBERS = ["NSID_ALL", "CID_NONE", "QUEUE_ENTRIES_MOST", "ADMIN_QUEUE_ENTRIES_MOST", "SQE_EXPONENT", "CQE_EXPONENT"]
NUMBERS += ["RW_BLOCKS_MOST", "DSM_RANGES_MOST"]


def python_layout() -> dict[str, tuple[int, int]]:
    table = {f"{enum.__name__}.{name}": (int(member), 0) for enum in ENUMS for name, member in enum.__members__.items()}
    table |= {f"spec.{name}": (getattr(spec, name), 0) for name in NUMBERS}
    table |= {f"{cls.__name__}.{name}": place[:2] for cls in BITS for name, place in cls.PLACES.items()}
    for cls in STRUCTURES:
        for name, (low, width, _) in cls.PLACES.items():
            assert low % 8 == width % 8 == 0, name
            table[f"{cls.__name__}.{name}"] = low // 8, width // 8
        table["size." + re.sub("(?<=[a-z])(?=[A-Z])", "_", cls.__name__).upper()] = (cls.SIZE, 0)
    for i in range(16):
        table[f"doorbells.{i}"] = (spec.sq_tail_doorbell(3, i), spec.cq_head_doorbell(3, i))
    return table


def packed_fields(cls: type[spec.Sqe | spec.Cqe], native: dict[str, tuple[int, int]]) -> None:
    """Each field, alone of ones, shows where it lies."""
    for name in cls.__slots__:
        bits = {"phase": 1, "status": 15}.get(name) if cls is spec.Cqe else None
        place = "status" if bits else name
        offset, size = native.pop(f"{cls.__name__}.{place}") if bits != 1 else native[f"{cls.__name__}.{place}"]
        ones = (1 << (bits or 8 * size)) - 1
        packed = cls(**{each: ones if each == name else 0 for each in cls.__slots__}).pack()
        found = int.from_bytes(packed[offset : offset + size], "little")
        assert found == ones << (bits == 15), name
        assert sum(packed) == sum(packed[offset : offset + size]), name


def test_python_and_cpp_say_the_same() -> None:
    native = _native.nvme_layout()
    packed_fields(spec.Sqe, native)
    packed_fields(spec.Cqe, native)
    assert native.pop("size.SQE") == (len(spec.Sqe(0).pack()), 0)
    assert native.pop("size.CQE") == (spec.Cqe.FORMAT.size, 0)
    assert native.pop("size.DSM_RANGE") == (len(spec.pack_dsm_ranges([(0, 0)])), 0)
    context, length, slba = (native.pop(f"DsmRange.{name}") for name in ("context_attributes", "length", "slba"))
    packed = spec.pack_dsm_ranges([(1, 2)])
    assert packed == b"".join(n.to_bytes(size, "little") for n, (_, size) in ((0, context), (2, length), (1, slba)))
    assert (context[0], length[0], slba[0]) == (0, 4, 8)
    # A descriptor's header: the type in the first byte, the length in the second.
    assert [native.pop(name)[0] for name in ("NamespaceDescriptor.nidt", "NamespaceDescriptor.nidl")] == [0, 1]
    assert native.pop("size.NAMESPACE_DESCRIPTOR") == (4, 0)
    masks = {name: native.pop(f"status.{name}") for name in ("sc", "sct", "crd", "more", "dnr", "code")}
    for name, (low, width) in masks.items():
        assert int(getattr(status, name)(0x7FFF)) == (1 << width) - 1
        assert int(getattr(status, name)((1 << width) - 1 << low)) == (1 << width) - 1, name
        assert not getattr(status, name)(0x7FFF & ~((1 << width) - 1 << low)), name
    assert native == python_layout()


def test_every_constant_of_the_header_is_compared() -> None:
    # What the table leaves out would be compared with nothing.
    table = (HEADERS.parents[1] / "bindings" / "nvme_layout.cpp").read_text()
    exported = {name for group in re.findall(r"CONSTANTS\(([^)]*)\)", table) for name in [*prefixed(group)]}
    exported |= set(re.findall(r"\bk[A-Z]\w+", table))
    for header in ("nvme_spec.h", "nvme_status.h", "nvme_data.h"):
        found = set(re.findall(r"inline constexpr [\w:]+ (k\w+)", (HEADERS / header).read_text()))
        # Shifts, masks and what the numbers of a field mean one at a time are used by C++ only.
        assert {name for name in found - exported if not re.match(ONLY_CPP, name)} == set(), header


ONLY_CPP = r"k(Cap|Cc|Csts|Aqa|CreateQueue|CreateCq|CreateSq|GetFeatures|SetFeatures|Log|Sqe|Rw)\w*(Shift|Mask)$"
ONLY_CPP += r"|kCapCss|kCapCrms|kCcEn$|kCcAms|kCsts|kNssrReset|kVersion20|kAbortNotAborted|kSetFeaturesSave"
ONLY_CPP += r"|kLogRetainEvent|kIdentifyBytes|kNamespaceListEntries"


def prefixed(group: str) -> list[str]:
    _, prefix, *names = (word.strip() for word in group.split(","))
    return [prefix + name for name in names]


@pytest.mark.parametrize("cls", [*BITS, *SHOWN])
@given(value=st.integers(0, (1 << 64) - 1))
def test_registers_survive_a_round_trip(cls: type[spec.Cap], value: int) -> None:
    decoded = cls.decode(value)
    encoded = decoded.encode()
    assert encoded & value == encoded  # nothing that was not there
    assert cls.decode(encoded) == decoded


def test_a_register_field_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Cc\.mps has 4 bits: 16 does not fit"):
        spec.Cc(mps=16).encode()


def test_a_field_without_a_default_must_be_said() -> None:
    with pytest.raises(TypeError, match="mqes"):
        spec.Cap()  # type: ignore[call-arg]


@pytest.mark.parametrize("cls", [*BITS, *SHOWN, *STRUCTURES])
def test_no_two_fields_overlap(cls: type[Layout]) -> None:
    taken = 0
    for name, (low, width, _) in cls.PLACES.items():
        field = (1 << width) - 1 << low
        assert not taken & field, name
        taken |= field
    assert taken.bit_length() <= 8 * getattr(cls, "SIZE", 8)


def test_what_registers_mean() -> None:
    # What QEMU's controller with a buffer of 64 MiB says: in BAR2, everything supported, in units of 1 MiB.
    size = spec.Cmbsz.decode(64 << 12 | 2 << 8 | 0b11111)
    assert (size.nbytes, size.unit_bytes, size.rds, size.wds) == (64 << 20, 1 << 20, 1, 1)
    assert spec.Cmbloc.decode(0xF4).bir == 4
    assert spec.Cmbmsc.decode(0x1234_5003).cba == 0x12345
    assert spec.Crto.decode(0x0002_0014) == spec.Crto(crwmt=20, crimt=2)
    cap = spec.Cap(mqes=1023, to=20, mpsmin=1, mpsmax=4, dstrd=2)
    assert (cap.queue_entries, cap.ready_timeout) == (1024, 10.0)
    assert (cap.page_bytes_min, cap.page_bytes_max) == (8192, 65536)
    assert spec.Cc.decode(0x00460001 | 2 << 7).page_bytes == 16384
    assert spec.Cc(en=1, iosqes=spec.SQE_EXPONENT, iocqes=spec.CQE_EXPONENT).encode() == 0x00460001
    assert str(spec.Version.decode(0x00010400)) == "1.4"
    assert str(spec.Version.decode(0x00010201)) == "1.2.1"
    assert (spec.sq_tail_doorbell(1, 0), spec.cq_head_doorbell(1, 0)) == (0x1008, 0x100C)


@given(st.binary(min_size=64, max_size=64))
def test_submission_entries_survive_a_round_trip(data: bytes) -> None:
    assert spec.Sqe.unpack(data).pack() == data


@given(st.binary(min_size=16, max_size=16))
def test_completion_entries_survive_a_round_trip(data: bytes) -> None:
    assert spec.Cqe.unpack(data).pack() == data


def test_a_completion_is_taken_apart() -> None:
    cqe = spec.Cqe.unpack(bytes.fromhex("efbeadde 00000000 0700 0100 3412 0b42"))
    assert (cqe.dw0, cqe.sq_head, cqe.sq_id, cqe.cid, cqe.phase) == (0xDEADBEEF, 7, 1, 0x1234, 1)
    assert (status.sct(cqe.status), status.sc(cqe.status)) == (1, 5)
    assert status.crd(cqe.status) == 0
    assert status.more(cqe.status)
    assert not status.dnr(cqe.status)


def test_statuses_are_described_with_their_numbers() -> None:
    text = status.describe(status.Status.LBA_OUT_OF_RANGE | status.StatusFlag.DNR)
    assert text == "blocks lie behind the namespace's end (SCT 0h, SC 80h, DNR)"
    assert status.name(0x4080) == "LBA_OUT_OF_RANGE"
    assert status.describe(0x7C1) == "vendor specific (SCT 7h, SC C1h)"
    assert status.describe(0x2C1).startswith("vendor specific")
    assert status.describe(0x07F) == "reserved by the specification (SCT 0h, SC 7Fh)"
    assert (
        status.describe(0x3802)
        == "a field of the command has a value that is not allowed (SCT 0h, SC 02h, CRD 3, More)"
    )


@given(st.integers(0, 0x7FFF))
def test_every_status_can_be_described(value: int) -> None:
    assert f"SC {value & 0xFF:02X}h" in status.describe(value)
    assert status.name(value) == "" or status.Status[status.name(value)] == status.code(value)


def test_no_two_statuses_share_a_text() -> None:
    assert len({each.text for each in status.Status}) == len(status.Status)


@given(st.integers(0, (1 << 32) - 1))
def test_every_event_can_be_shown(dw0: int) -> None:
    assert str(spec.AsyncEvent.decode(dw0))


def test_events_and_commands_have_names() -> None:
    assert str(spec.AsyncEvent.decode(0x010100)) == "invalid doorbell value"
    assert str(spec.AsyncEvent.decode(0x040002)) == "namespaces changed"
    assert str(spec.AsyncEvent.decode(0x020201)) == "spare is low"
    assert str(spec.AsyncEvent.decode(0x0000FF07)) == "event of type 7, information 0xff"
    assert spec.admin_opcode_name(6) == "IDENTIFY"
    assert spec.admin_opcode_name(0xC1) == "admin command C1h"
    assert spec.nvm_opcode_name(2) == "READ"
    assert spec.nvm_opcode_name(0x99) == "I/O command 99h"


# ---- Data structures


@pytest.mark.parametrize("cls", STRUCTURES)
@given(data=st.binary(max_size=5000))
def test_any_bytes_decode_or_are_refused(cls: type[Structure], data: bytes) -> None:
    if len(data) >= cls.SIZE:
        cls.decode(data)
    else:
        with pytest.raises(ControllerError, match=str(cls.SIZE)):
            cls.decode(data)


@given(st.integers(0, 1 << 64))
def test_any_controller_can_be_looked_at(seed: int) -> None:
    info = identify.IdentifyController.decode(Random(seed).randbytes(4096))
    assert all(text.isprintable() for text in (info.sn, info.mn, info.fr, info.subnqn))
    assert 1 <= len(info.power_states) <= 32
    assert [state.watts >= 0 for state in info.power_states]
    assert str(info.version)
    limit = info.max_transfer_bytes(4096)
    assert limit is None if info.mdts == 0 else limit == 4096 << info.mdts


@given(st.integers(0, 1 << 64))
def test_any_namespace_has_a_usable_block_or_is_refused(seed: int) -> None:
    namespace = identify.IdentifyNamespace.decode(Random(seed).randbytes(4096))
    try:
        assert 512 <= namespace.lba_bytes <= 1 << 20
    except ControllerError as error:
        assert "2^" in str(error)  # noqa: PT017
    assert namespace.lba_format in namespace.lbaf


def test_a_controller_is_taken_apart() -> None:
    data = bytearray(4096)
    data[0:2] = b"\x36\x1b"
    data[4:24] = b"S123".ljust(20)
    data[24:64] = b"A model\x1b[2J".ljust(40)
    data[64:72] = b"1.0\0\0\0\0\0"
    data[77] = 5
    data[80:84] = (0x00020000).to_bytes(4, "little")
    data[516:520] = (3).to_bytes(4, "little")
    data[520] = 0x0C
    data[525] = 7
    data[263] = 1
    data[2048 + 32 : 2048 + 36] = b"\xe8\x03\x00\x03"
    info = identify.IdentifyController.decode(data)
    assert (info.vid, info.sn, info.fr, str(info.version)) == (0x1B36, "S123", "1.0", "2.0")
    assert info.mn == "A model\\x1b[2J"  # nothing that a terminal would obey
    assert info.max_transfer_bytes(4096) == 128 << 10
    assert info.nn == 3
    assert identify.Oncs(info.oncs) == identify.Oncs.DATASET_MANAGEMENT | identify.Oncs.WRITE_ZEROES
    assert info.volatile_write_cache
    assert info.flush_all_namespaces
    assert len(info.power_states) == 2
    assert info.power_states[1].watts == pytest.approx(0.1)
    assert not info.power_states[1].operational


@pytest.mark.parametrize(
    ("nlbaf", "flbas", "index"),
    [(0, 0, 0), (15, 0x0F, 15), (15, 0x61, 1), (16, 0x20, 16), (63, 0x6F, 63), (3, 0x12, 2)],
)
def test_the_format_in_use_is_found(nlbaf: int, flbas: int, index: int) -> None:
    data = bytearray(4096)
    data[25], data[26] = nlbaf, flbas
    data[128 + 4 * index : 132 + 4 * index] = b"\x08\x00\x0c\x00"
    namespace = identify.IdentifyNamespace.decode(data)
    assert namespace.lba_bytes == 4096
    assert namespace.metadata_bytes == 8
    assert namespace.metadata_interleaved == bool(flbas & 0x10)


def words(*ids: int) -> bytes:
    return b"".join(i.to_bytes(4, "little") for i in ids)


def test_namespaces_are_listed_up_to_zero() -> None:
    assert identify.namespace_list(words(1, 2, 7, 0, 9)) == [1, 2, 7]
    assert identify.namespace_list(words(*range(1, 2000))) == list(range(1, 1025))
    assert identify.namespace_list(b"") == []
    assert identify.namespace_list(b"\1\0\0") == []


@pytest.mark.parametrize(("ids", "after"), [((1, 1), 0), ((5, 3), 0), ((4,), 4)])
def test_a_list_that_does_not_ascend_is_refused(ids: tuple[int, ...], after: int) -> None:
    # Asking for the ids behind the last one of such a list would never end.
    with pytest.raises(ControllerError, match="ascend"):
        identify.namespace_list(words(*ids), after)


@given(st.binary(max_size=5000))
def test_any_lists_decode_or_are_refused(data: bytes) -> None:
    assert len(identify.controller_list(data)) <= 2047
    try:
        ids = identify.namespace_list(data)
        assert ids == sorted(set(ids))
    except ControllerError as error:
        assert "ascend" in str(error)  # noqa: PT017


def test_controllers_are_listed_as_far_as_they_go() -> None:
    assert identify.controller_list(b"\2\0\7\0\x08\0\x09\0") == [7, 8]
    assert identify.controller_list(b"\xff\xff\7\0") == [7]


NIDS = {1: bytes(range(8)), 2: bytes(range(16)), 3: bytes(range(16, 32)), 4: b"\0"}


def descriptor(kind: int, nid: bytes) -> bytes:
    return bytes([kind, len(nid), 0, 0]) + nid


def test_namespace_descriptors_are_taken_apart() -> None:
    data = b"".join(descriptor(kind, nid) for kind, nid in NIDS.items()) + descriptor(9, b"unknown")
    found = identify.NamespaceDescriptors.decode(data.ljust(4096, b"\0"))
    assert (found.eui64, found.nguid, found.csi) == (NIDS[1], NIDS[2], 0)
    assert found.uuid is not None
    assert found.uuid.bytes == NIDS[3]
    assert identify.NamespaceDescriptors.decode(bytes(4096)) == identify.NamespaceDescriptors()


@pytest.mark.parametrize("data", [descriptor(1, b"short"), descriptor(3, b"x" * 17), b"\2\x10\0\0abc", b"\x09\0\0\0"])
def test_wrong_descriptors_are_refused(data: bytes) -> None:
    with pytest.raises(ControllerError, match="descriptor"):
        identify.NamespaceDescriptors.decode(data)


@given(st.lists(st.tuples(st.integers(0, 5), st.binary(max_size=20))), st.binary(max_size=64))
def test_any_descriptors_decode_or_are_refused(parts: list[tuple[int, bytes]], tail: bytes) -> None:
    data = b"".join(descriptor(kind, nid) for kind, nid in parts) + tail
    try:
        identify.NamespaceDescriptors.decode(data)
    except ControllerError as error:
        assert "descriptor" in str(error)  # noqa: PT017


def test_health_has_units() -> None:
    data = bytearray(512)
    data[0] = 0b1001
    data[1:3] = (310).to_bytes(2, "little")
    data[32:48] = (3).to_bytes(16, "little")
    data[48:64] = (1 << 100).to_bytes(16, "little")
    data[202:204] = (300).to_bytes(2, "little")
    log = logs.SmartLog.decode(data)
    assert log.celsius == 37
    assert log.sensors_celsius == {2: 27}
    assert (log.bytes_read, log.bytes_written) == (1_536_000, 512_000 << 100)
    assert log.warnings == ["available spare is below its threshold", "the media is read-only"]
    assert logs.SmartLog.decode(bytes(512)).celsius is None


@given(st.binary(max_size=64 * 5))
def test_any_error_log_decodes(data: bytes) -> None:
    assert all(entry.error_count for entry in logs.decode_error_log(data))


def test_the_error_log_leaves_out_empty_entries() -> None:
    entry = bytearray(64)
    entry[0], entry[12:14], entry[14:16] = 9, (0x4004 << 1 | 1).to_bytes(2, "little"), b"\x28\x02"
    log = logs.decode_error_log(bytes(entry) + bytes(64) + bytes(entry[:40]))
    assert len(log) == 1
    assert (log[0].error_count, log[0].status_field, log[0].parameter) == (9, 0x4004, (0x28, 2))
    entry[14:16] = b"\xff\xff"
    assert logs.ErrorLogEntry.decode(entry).parameter is None


def test_firmware_slots_are_listed() -> None:
    data = bytearray(512)
    data[0] = 0x21
    data[8:16], data[16:24] = b"1.0     ", b"2.0     "
    log = logs.FirmwareSlotLog.decode(data)
    assert (log.active_slot, log.next_slot, log.revisions) == (1, 2, {1: "1.0", 2: "2.0"})
    assert logs.FirmwareSlotLog.decode(bytes(512)).next_slot is None
