"""A client's conversation with a vfio-user server: commands and their replies, and what the server asks in between.

One thread at a time talks. A second one, of this module's, sleeps on the socket: it answers what the server asks while
nobody talks, and notices when the server goes away.
"""

from __future__ import annotations

import errno
import itertools
import os
import select
import socket
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from typing import NoReturn, Protocol, TypeVar

from gpunvme.errors import TransportError
from gpunvme.nvme.vfio_user.channel import Channel, ClosedByPeer, Message, TooLate
from gpunvme.nvme.vfio_user.messages import (
    DEFAULT_MAX_DATA,
    MAJOR,
    MAX_FDS,
    MINOR,
    Capabilities,
    Command,
    Header,
    HeaderFlag,
    ProtocolError,
    Version,
    command_name,
)
from gpunvme.nvme.vfio_user.payloads import DmaAccess

_PROPOSAL = Capabilities(max_msg_fds=MAX_FDS, max_data_xfer_size=DEFAULT_MAX_DATA)
_Payload = TypeVar("_Payload")
_SERVING_SECONDS = 5.0  # for sending an answer to the server, and for the rest of a message that has begun


class Refused(Exception):
    """The server answered with an error."""

    def __init__(self, number: int) -> None:
        super().__init__(os.strerror(number) if number else "no reason given")
        self.errno = number


class Memory(Protocol):
    """What the server may read and write by messages."""

    def read(self, iova: int, nbytes: int) -> bytes | None:
        """Bytes of a range; None if it is not ours."""

    def write(self, iova: int, data: bytes) -> bool:
        """Change bytes of a range; whether it is ours."""


def connect_socket(path: str, timeout: float) -> socket.socket:
    """Connect to a server's socket.

    Raises
    ------
    TransportError
        If that cannot be; says what to do.
    """
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    sock.settimeout(timeout)
    advice = {
        errno.ENOENT: "there is no such socket; start the server first, as `gpunvme nvme soft FILE --socket` does",
        errno.ECONNREFUSED: "no server listens on it (any more); start it again",
        errno.ENOTSOCK: "it is not a socket",
        errno.EPROTOTYPE: "it is a socket of another kind; a vfio-user server has a stream socket",
        errno.EACCES: "no permission; run as the user that the server runs as, or let that user open the socket",
        errno.EAGAIN: "too many clients wait for the server already",
    }
    try:
        sock.connect(path)
    except TimeoutError as error:
        sock.close()
        raise TransportError(f"vfio-user:{path}: the server takes no connection for {timeout:g} s") from error
    except (OSError, ValueError) as error:
        sock.close()
        number = error.errno if isinstance(error, OSError) and error.errno else 0
        if not number and len(os.fsencode(path)) > 107:
            reason = "the path is too long for a socket: at most 107 bytes; use a relative one, or a symbolic link"
        else:
            reason = advice.get(number) or (os.strerror(number) if number else str(error))
        raise TransportError(f"vfio-user:{path}: {reason}") from error
    return sock


class Connection:
    """A negotiated connection. Any thread may use it.

    Parameters
    ----------
    path
        The server's socket.
    timeout
        How long an answer may take, in seconds.

    Raises
    ------
    TransportError
        If there is no server, or none that we understand.
    """

    def __init__(self, path: str, timeout: float) -> None:
        self.where = f"vfio-user:{path}"
        self.timeout = timeout
        self._memory: Callable[[], Memory | None] = lambda: None
        self._lock = threading.RLock()
        self._ids = itertools.count(1)
        self._process = os.getpid()
        self._broken: str | None = None
        self._listener: threading.Thread | None = None
        self._channel = Channel(connect_socket(path, timeout))
        try:
            self.capabilities = self._negotiate()
        except BaseException:
            self._channel.close()
            raise
        # When the last reference goes without `close`, the end of the connection wakes the listener, and it ends too.
        weakref.finalize(self, self._channel.close).atexit = False
        self._listener = threading.Thread(
            target=_listen, args=(weakref.ref(self), self._channel.fileno()), name="gpunvme-vfio-user", daemon=True
        )
        self._listener.start()

    def _negotiate(self) -> Capabilities:
        named = frozenset({"max_msg_fds", "max_data_xfer_size"})
        try:
            with self.request(Command.VERSION, Version(MAJOR, MINOR, _PROPOSAL, named).pack()) as reply:
                version = Version.unpack(reply.payload)
        except Refused as error:
            raise TransportError(
                f"{self.where}: the server refuses version {MAJOR}.{MINOR} of vfio-user: {error}"
            ) from error
        except ProtocolError as error:
            self._fail(self._describe(error, Command.VERSION))
        if version.major != MAJOR or version.minor > MINOR:
            raise TransportError(
                f"{self.where}: the server speaks version {version.major}.{version.minor} of vfio-user, we speak "
                f"{MAJOR}.{MINOR}; use a server of that version"
            )
        return version.capabilities

    def request(
        self, command: Command, payload: bytes = b"", fds: Sequence[int] = (), *, timeout: float | None = None
    ) -> Message:
        """Send a command and wait for its reply. The caller closes the reply, a context manager.

        Raises
        ------
        Refused
            If the server answers with an error.
        TransportError
            If it does not answer in time, or not as it must; from then on always.
        """
        timeout = self.timeout if timeout is None else timeout
        if os.getpid() != self._process:  # before the lock: another thread may have had it at the fork
            raise TransportError(f"{self.where}: opened by another process; open it anew after a fork")
        if not self._lock.acquire(timeout=timeout):
            raise TransportError(
                f"{self.where}: no answer to {command_name(command)} for {timeout:g} s. The server still owes another "
                "one, or hangs in the middle of a message; wait, or start it again"
            )
        try:
            reply = self._converse(Header(next(self._ids) & 0xFFFF, command, 0), payload, fds, timeout)
        finally:
            self._lock.release()
        if reply.header.flags & HeaderFlag.ERROR:
            reply.close()
            raise Refused(reply.header.error if reply.header.error < 4096 else 0)
        return reply

    def _converse(self, header: Header, payload: bytes, fds: Sequence[int], timeout: float) -> Message:
        if self._broken is not None:
            raise TransportError(f"{self.where}: {self._broken}")
        deadline = time.monotonic() + timeout
        try:
            self._channel.send(header, payload, fds, deadline=deadline)
            return self._reply(header, deadline)
        except TooLate:
            self._fail(
                f"no answer to {command_name(header.command)} for {timeout:g} s. The server hangs, or is busy with "
                "another client: end that one, or start the server again"
            )
        except (ClosedByPeer, ProtocolError) as error:
            self._fail(self._describe(error, header.command))
        except BaseException:  # Ctrl-C: half a message may have been sent or taken
            self._give_up(f"interrupted in the middle of {command_name(header.command)}; open the controller anew")
            raise

    def ask(
        self, command: Command, payload: bytes = b"", fds: Sequence[int] = (), *, timeout: float | None = None
    ) -> Message:
        """Send a command that no server refuses without need, and wait for its reply; as `request`.

        Raises
        ------
        TransportError
            If the server refuses it, or does not answer.
        """
        try:
            return self.request(command, payload, fds, timeout=timeout)
        except Refused as error:
            raise self.refused(command.name, error) from error

    def parse(self, unpack: Callable[[bytes], _Payload], reply: Message) -> _Payload:
        """Take a reply's payload apart.

        Raises
        ------
        TransportError
            If it is none.
        """
        try:
            return unpack(reply.payload)
        except ProtocolError as error:
            raise TransportError(f"{self.where}: {self._describe(error, reply.header.command)}") from error

    def refused(self, what: str, error: Refused) -> TransportError:
        """Make the error for something that the server refuses."""
        return TransportError(f"{self.where}: the server refuses {what}: {error}")

    def _reply(self, header: Header, deadline: float) -> Message:
        while True:
            message = self._channel.receive(deadline)
            if not message.is_reply:
                if time.monotonic() > deadline:  # a server that never stops asking
                    message.close()
                    raise TooLate
                with message:
                    self._answer(message, deadline)
                continue
            if (message.header.id, message.header.command) != (header.id, header.command):
                message.close()
                raise ProtocolError(
                    f"a reply to {command_name(message.header.command)} came where one to "
                    f"{command_name(header.command)} was due"
                )
            return message

    def _describe(self, error: ClosedByPeer | ProtocolError, command: int | None) -> str:
        if isinstance(error, ProtocolError):
            return f"the server does not keep to the protocol: {error}"
        if command == Command.VERSION:
            return (
                f"the server closed the connection instead of answering VERSION {MAJOR}.{MINOR}; it may speak another "
                "version, or be no vfio-user server"
            )
        return "the server closed the connection; start it again, and open the controller anew"

    def _give_up(self, reason: str) -> str:
        """End the connection for a reason, if there is none yet; return the reason."""
        # After a broken message nobody knows where the next one begins: nothing more can be said on this connection.
        if self._broken is None:
            self._broken = reason
        self._channel.close()
        return self._broken

    def _fail(self, reason: str) -> NoReturn:
        raise TransportError(f"{self.where}: {self._give_up(reason)}")

    # --- what the server asks

    def lend(self, memory: Memory) -> None:
        """Let the server read and write memory by messages, as long as somebody else keeps it alive."""
        self._memory = weakref.ref(memory)

    def _answer(self, message: Message, deadline: float) -> None:
        payload, error = b"", 0
        try:
            payload = self._serve(message)
        except ProtocolError:
            error = errno.EINVAL
        except Refused as refusal:
            error = refusal.errno
        if message.wants_reply:
            flags = HeaderFlag.REPLY | (HeaderFlag.ERROR if error else 0)
            header = Header(message.header.id, message.header.command, 0, int(flags), error)
            self._channel.send(header, payload, deadline=deadline)

    def _serve(self, message: Message) -> bytes:
        command = message.header.command
        if command not in (Command.DMA_READ, Command.DMA_WRITE):
            raise Refused(errno.EOPNOTSUPP)
        access = DmaAccess.unpack(message.payload)
        if access.nbytes > DEFAULT_MAX_DATA:
            raise Refused(errno.E2BIG)
        memory = self._memory()
        if command == Command.DMA_READ:
            data = memory.read(access.address, access.nbytes) if memory is not None else None
            if data is None:
                raise Refused(errno.EFAULT)
            return access._replace(data=data).pack()
        if len(access.data) != access.nbytes:
            raise Refused(errno.EINVAL)
        if memory is None or not memory.write(access.address, access.data):
            raise Refused(errno.EFAULT)
        return access._replace(data=b"").pack()

    def attend(self) -> bool:
        """Take what came while nobody talked; False when the connection has ended."""
        with self._lock:
            if self._broken is not None:
                return False
            try:
                if not self._channel.readable(0):
                    return True  # it was for somebody who talked, and took it
                deadline = time.monotonic() + _SERVING_SECONDS
                with self._channel.receive(deadline) as message:
                    if message.is_reply:
                        raise ProtocolError("a reply came where none was due")
                    self._answer(message, deadline)
                return True
            except TooLate:
                self._give_up("the server hangs in the middle of a message; start it again")
            except (ClosedByPeer, ProtocolError) as error:
                self._give_up(self._describe(error, None))
            return False

    def close(self) -> None:
        """End the connection: the server lets go of everything that it was given."""
        if os.getpid() != self._process:
            self._channel.close()
            return
        if self._broken is None:
            self._broken = "closed"
        self._channel.shut_down()  # wakes whoever waits for an answer, and has the lock
        with self._lock:
            self._channel.close()
        if self._listener is not None and self._listener is not threading.current_thread():
            self._listener.join(timeout=_SERVING_SECONDS)


def _listen(connection: Callable[[], Connection | None], fd: int) -> None:
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    while True:
        poll.poll(1000)  # not for ever: the descriptor may have been closed just before, and be another file by now
        alive = connection()
        if alive is None or not alive.attend():
            return
        del alive
