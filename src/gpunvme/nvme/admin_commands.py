"""What a controller can be asked: admin commands, one method each (NVM Express Base Specification 2.0, section 5)."""

from __future__ import annotations

import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence

from gpunvme.errors import DeadlineExceeded
from gpunvme.nvme import logs, spec
from gpunvme.nvme.admin import AdminQueue, command_error
from gpunvme.nvme.dma import DmaMemory
from gpunvme.nvme.identify import IdentifyController, IdentifyNamespace, namespace_list
from gpunvme.nvme.registers import Registers
from gpunvme.nvme.transport import Transport

_DATA_BYTES = 4096  # of every Identify data structure and of the log pages that are read here
_EVENT_REQUESTS = 4


class AdminCommands(ABC):
    """Admin commands over an admin queue that `Controller`, which this is the base of, brings up.

    Parameters
    ----------
    transport, registers
        The controller's.
    memory
        That it reaches: the admin queues' two pages, and a page for data.
    timeout
        Seconds that a command may take.
    """

    info: IdentifyController
    _admin: AdminQueue

    def __init__(self, transport: Transport, registers: Registers, memory: DmaMemory, timeout: float) -> None:
        self.transport = transport
        self.registers = registers
        self.aborts = 0
        self._admin_timeout = timeout
        self._admin_memory = memory
        self._command_lock = threading.Lock()  # one at a time uses the data page
        self._data_offset = 2 * registers.cap.page_bytes_min
        self._data = memory.view(self._data_offset, _DATA_BYTES)

    @abstractmethod
    def check_open(self) -> None:
        """Raise if the controller cannot be used any more."""

    def command(
        self,
        opcode: int,
        *,
        nsid: int = 0,
        prp1: int = 0,
        cdw: tuple[int, ...] = (),
        timeout: float | None = None,
    ) -> spec.Cqe:
        """Send an admin command and wait for its answer.

        Parameters
        ----------
        cdw
            Command dwords 10 and up.
        timeout
            Seconds; `admin_timeout` if None.

        Raises
        ------
        CommandError
            If the controller refuses it.
        DeviceGoneError, ControllerError
            If the controller is gone or has failed.
        DeadlineExceeded
            If it does not answer.
        """
        self.check_open()
        limit = self._admin_timeout if timeout is None else timeout
        cid = self._admin.submit(opcode, nsid, prp1, cdw=cdw)
        start = time.monotonic()
        pause = 0.0
        while (answer := self._admin.answer(cid)) is None:
            elapsed = time.monotonic() - start
            if elapsed > 0.001:
                self.registers.check_alive()
                pause = min(0.005, pause + 0.0001)
            if elapsed > limit:
                self._admin.abandon(cid)
                raise DeadlineExceeded(f"{self.transport.uri}: no answer to {_name(opcode)} for {limit:.1f} s")
            time.sleep(pause)
        if answer.status:
            raise command_error(f"{self.transport.uri}: {_name(opcode)}", opcode, answer)
        return answer

    def _data_in(self, opcode: int, nsid: int, cdw: tuple[int, ...], nbytes: int = _DATA_BYTES) -> bytes:
        with self._command_lock:
            self._data[:] = bytes(_DATA_BYTES)
            self.command(opcode, nsid=nsid, prp1=self._admin_memory.iova(self._data_offset), cdw=cdw)
            return bytes(self._data[:nbytes])

    def _identify(self, cns: int, nsid: int = 0) -> bytes:
        return self._data_in(spec.AdminOpcode.IDENTIFY, nsid, (cns,))

    def identify(self) -> IdentifyController:
        """Ask who it is (Identify Controller)."""
        self.info = IdentifyController.decode(self._identify(spec.Cns.CONTROLLER))
        return self.info

    def identify_namespace(self, nsid: int) -> IdentifyNamespace:
        """Ask what a namespace is like (Identify Namespace)."""
        return IdentifyNamespace.decode(self._identify(spec.Cns.NAMESPACE, nsid))

    def namespace_ids(self) -> list[int]:
        """Ids of the active namespaces, ascending."""
        found: list[int] = []
        while True:
            # 1,024 ids at a time, all larger than the one given.
            last = found[-1] if found else 0
            page = namespace_list(self._identify(spec.Cns.ACTIVE_NAMESPACES, last), last)
            found += page
            if len(page) < 1024:
                return found

    def get_feature(self, feature: int, *, nsid: int = 0, select: int = 0) -> int:
        """Value of a feature that fits into a dword; ``select`` 0 is the current one, 1 the default, 2 the saved."""
        return self.command(spec.AdminOpcode.GET_FEATURES, nsid=nsid, cdw=(select << 8 | feature,)).dw0

    def set_feature(self, feature: int, value: int, *, nsid: int = 0, save: bool = False) -> int:
        """Set a feature that fits into a dword; return what the controller answers."""
        return self.command(spec.AdminOpcode.SET_FEATURES, nsid=nsid, cdw=(int(save) << 31 | feature, value)).dw0

    def log_page(self, page: int, nbytes: int, *, nsid: int = spec.NSID_ALL, clear_events: bool = True) -> bytes:
        """The first ``nbytes`` bytes of a log page, at most 4096; a multiple of 4.

        ``clear_events`` lets the controller report the events again that this page tells about.
        """
        if nbytes % 4 or not 0 < nbytes <= _DATA_BYTES:
            raise ValueError(f"a log page is read in multiples of 4 bytes, at most {_DATA_BYTES}")
        dwords = nbytes // 4 - 1
        retain = 0 if clear_events else 1 << 15
        return self._data_in(spec.AdminOpcode.GET_LOG_PAGE, nsid, ((dwords & 0xFFFF) << 16 | retain | page,), nbytes)

    def smart(self) -> logs.SmartLog:
        """Health and endurance (SMART / Health Information)."""
        return logs.SmartLog.decode(self.log_page(spec.LogPage.SMART, 512))

    def error_log(self) -> Sequence[logs.ErrorLogEntry]:
        """The latest errors that the controller has noted, newest first."""
        count = min(self.info.elpe + 1, _DATA_BYTES // 64)
        return logs.decode_error_log(self.log_page(spec.LogPage.ERROR, 64 * count))

    def firmware_log(self) -> logs.FirmwareSlotLog:
        """Firmware slots."""
        return logs.FirmwareSlotLog.decode(self.log_page(spec.LogPage.FIRMWARE_SLOT, 512))

    def abort(self, queue_id: int, cid: int, timeout: float | None = None) -> bool:
        """Ask for a command to be aborted; whether the controller says that it did."""
        self.aborts += 1
        answer = self.command(spec.AdminOpcode.ABORT, cdw=(cid << 16 | queue_id,), timeout=timeout)
        return not answer.dw0 & 1

    def events(self) -> list[spec.AsyncEvent]:
        """Asynchronous events since the last call. Reading the log page that one names lets it come again."""
        self.check_open()
        self._admin.poll()
        found = []
        while self._admin.events:
            found.append(spec.AsyncEvent.decode(self._admin.events.popleft()))
        self._request_events()
        return found

    def _request_events(self) -> None:
        for _ in range(min(_EVENT_REQUESTS, self.info.aerl + 1) - self._admin.requests_for_events()):
            self._admin.submit(spec.AdminOpcode.ASYNC_EVENT_REQUEST, event=True)


def _name(opcode: int) -> str:
    """What the specification calls an admin command."""
    try:
        return spec.AdminOpcode(opcode).name.replace("_", " ").title()
    except ValueError:
        return f"admin command {opcode:02X}h"
