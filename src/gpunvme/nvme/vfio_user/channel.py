"""Whole messages over a Unix socket, with descriptors beside them and a deadline on every wait."""

from __future__ import annotations

import array
import contextlib
import os
import select
import socket
import time
from collections.abc import Sequence
from typing import Self

from gpunvme.nvme.vfio_user.messages import HEADER_BYTES, MAX_FDS, Header, HeaderFlag, ProtocolError

# The kernel passes no more at once (SCM_MAX_FD). With room for all of them none is lost unseen.
_ROOM = socket.CMSG_SPACE(253 * array.array("i").itemsize)
_AT_ONCE = 1 << 20


class ClosedByPeer(Exception):
    """The other side has closed the connection, between two messages."""


class TooLate(Exception):
    """A deadline has passed."""


class Message:
    """A message that came. A context manager: descriptors that nobody has taken by its end are closed."""

    __slots__ = ("_fds", "header", "payload")

    def __init__(self, header: Header, payload: bytes, fds: list[int]) -> None:
        self.header = header
        self.payload = payload
        self._fds = fds

    @property
    def is_reply(self) -> bool:
        """Whether it answers one of ours."""
        return self.header.flags & HeaderFlag.TYPE == HeaderFlag.REPLY

    @property
    def wants_reply(self) -> bool:
        """Whether the other side waits for an answer."""
        return not self.is_reply and not self.header.flags & HeaderFlag.NO_REPLY

    @property
    def fd_count(self) -> int:
        """How many descriptors came with it and were not taken."""
        return len(self._fds)

    def take_fds(self) -> list[int]:
        """The descriptors; the caller closes them."""
        fds, self._fds = self._fds, []
        return fds

    def close(self) -> None:
        """Close the descriptors that were not taken."""
        close_all(self.take_fds())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def close_all(fds: Sequence[int]) -> None:
    """Close descriptors."""
    for fd in fds:
        os.close(fd)


class Channel:
    """One end of a connection. Takes over the socket.

    Deadlines are of `time.monotonic`.
    """

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._socket = sock
        self._process = os.getpid()

    def fileno(self) -> int:
        """The socket's descriptor, for `select`."""
        return self._socket.fileno()

    def shut_down(self) -> None:
        """End the connection; whoever waits on it is woken. Not in a forked child: there it is the parent's."""
        if os.getpid() == self._process:
            with contextlib.suppress(OSError):  # the other side was faster
                self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """End the connection and close the socket."""
        self.shut_down()
        self._socket.close()

    def readable(self, seconds: float) -> bool:
        """Wait until something came or the connection ended; whether it did, in time."""
        return self._wait(select.POLLIN, time.monotonic() + seconds)

    def _wait(self, event: int, deadline: float) -> bool:
        poll = select.poll()
        poll.register(self._socket, event)
        left = deadline - time.monotonic()
        return bool(poll.poll(max(0.0, left) * 1000))

    def _wait_for(self, event: int, deadline: float) -> None:
        # The clock decides, not only poll: a peer that sends one byte at a time is late too.
        if time.monotonic() > deadline or not self._wait(event, deadline):
            raise TooLate

    def send(self, header: Header, payload: bytes = b"", fds: Sequence[int] = (), *, deadline: float) -> None:
        """Send one message.

        Raises
        ------
        TooLate
            If the other side does not read.
        ClosedByPeer
            If it has gone.
        """
        data = memoryview(header._replace(size=HEADER_BYTES + len(payload)).pack() + payload)
        beside = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        while data:
            try:
                sent = self._socket.sendmsg([data], beside, socket.MSG_NOSIGNAL)
            except BlockingIOError:
                self._wait_for(select.POLLOUT, deadline)
                continue
            except OSError as error:
                raise ClosedByPeer from error
            beside = []  # descriptors go with the first byte
            data = data[sent:]

    def receive(self, deadline: float) -> Message:
        """The next message.

        Raises
        ------
        TooLate
            If it does not come, or not whole.
        ClosedByPeer
            If the other side has gone.
        ProtocolError
            If it is none, or the connection ended in the middle of it.
        """
        fds: list[int] = []
        try:
            header = Header.unpack(self._receive_header(fds, deadline))
            payload = self._receive_rest(header.size - HEADER_BYTES, deadline)
        except BaseException:
            close_all(fds)
            raise
        return Message(header, payload, fds)

    def _receive_header(self, fds: list[int], deadline: float) -> bytes:
        data = b""
        while len(data) < HEADER_BYTES:
            try:
                # Close-on-exec from the start: no other thread's child can inherit what came.
                part, beside, flags, _ = self._socket.recvmsg(HEADER_BYTES - len(data), _ROOM, socket.MSG_CMSG_CLOEXEC)
            except BlockingIOError:
                self._wait_for(select.POLLIN, deadline)
                continue
            except OSError as error:
                raise ClosedByPeer from error
            for level, kind, numbers in beside:
                if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                    came = array.array("i")
                    came.frombytes(numbers[: len(numbers) - len(numbers) % came.itemsize])
                    fds.extend(came)
            if flags & socket.MSG_CTRUNC or len(fds) > MAX_FDS:
                raise ProtocolError(f"a message came with more than {MAX_FDS} descriptors")
            if not part:
                if data:
                    raise ProtocolError("the connection ended in the middle of a message")
                raise ClosedByPeer
            data += part
        return data

    def _receive_rest(self, nbytes: int, deadline: float) -> bytes:
        data = bytearray()
        while len(data) < nbytes:
            try:
                # Without room for them, descriptors that come in the middle of a message are closed by the kernel.
                part = self._socket.recv(min(nbytes - len(data), _AT_ONCE))
            except BlockingIOError:
                self._wait_for(select.POLLIN, deadline)
                continue
            except OSError as error:
                raise ProtocolError("the connection ended in the middle of a message") from error
            if not part:
                raise ProtocolError("the connection ended in the middle of a message")
            data += part
        return bytes(data)
