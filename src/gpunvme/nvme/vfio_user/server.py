"""A vfio-user server: an NVMe controller of this process, for QEMU or whoever else speaks vfio-user.

Messages are rare: registers, mappings, interrupts. Commands and data go through memory that is shared, so a loop in
Python is fast enough.
"""

from __future__ import annotations

import errno
import os
import select
import signal
import socket
import stat
import threading
from collections.abc import Callable

from gpunvme.errors import TransportError
from gpunvme.nvme.pci_config import PciConfig
from gpunvme.nvme.vfio_user.channel import Channel, ClosedByPeer, TooLate
from gpunvme.nvme.vfio_user.connection import connect_socket
from gpunvme.nvme.vfio_user.messages import ProtocolError
from gpunvme.nvme.vfio_user.session import Controller, Session

# How soon a request to stop is noticed, in seconds.
_LOOK = 0.1
_WAITING_CLIENTS = 8


def serve(
    socket_path: str | os.PathLike[str],
    controller: Controller,
    *,
    stop: threading.Event | None = None,
    mmap_doorbells: bool = True,
    vectors: int = 64,
    ready: Callable[[], object] = lambda: None,
    report: Callable[[str], object] = lambda text: None,
) -> None:
    """Serve a controller to one client after another; others wait for their turn. Returns when it is asked to stop.

    Parameters
    ----------
    socket_path
        Where the Unix socket is made. What an ended server has left there is replaced. Only this user may connect.
    controller
        The controller, a `_native.SoftController` for example. It stays the caller's, and is reset after each client.
    stop
        Ends the server when it is set. Without it, SIGTERM and SIGINT do; that needs the main thread.
    mmap_doorbells
        Whether clients may map the doorbells, rather than send a message for each.
    vectors
        MSI-X vectors that clients are offered.
    ready
        Called when clients can connect.
    report
        Called with a line of text about clients that come and go, and what they were refused.

    Raises
    ------
    TransportError
        If the socket cannot be made; says what to do.
    """
    if stop is not None:
        _Server(socket_path, controller, mmap_doorbells, vectors, report).run(stop, ready)
        return
    stop = threading.Event()
    ended = stop
    signals = (signal.SIGTERM, signal.SIGINT)
    before = {number: signal.signal(number, lambda *_: ended.set()) for number in signals}
    try:
        _Server(socket_path, controller, mmap_doorbells, vectors, report).run(stop, ready)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Server:
    def __init__(
        self,
        socket_path: str | os.PathLike[str],
        controller: Controller,
        mmap_doorbells: bool,
        vectors: int,
        report: Callable[[str], object],
    ) -> None:
        self._path = os.fspath(socket_path)
        self._controller = controller
        self._mmap_doorbells = mmap_doorbells
        self._config = PciConfig(controller.bar_nbytes, vectors, controller.reset)
        self._report = report

    def run(self, stop: threading.Event, ready: Callable[[], object]) -> None:
        listener, inode = _listen(self._path)
        try:
            ready()
            while not stop.is_set():
                if not _readable(listener):
                    continue
                try:
                    client, _ = listener.accept()
                except OSError:
                    stop.wait(_LOOK)  # it has gone again, or there are no descriptors left
                    continue
                self._serve_client(Channel(client), stop)
        finally:
            listener.close()
            _remove(self._path, inode)

    def _serve_client(self, channel: Channel, stop: threading.Event) -> None:
        session = Session(
            channel, self._controller, self._config, mmap_doorbells=self._mmap_doorbells, report=self._report
        )
        self._report("a client has connected")
        reason = "the server stops"
        try:
            while not stop.is_set():
                if channel.readable(_LOOK):
                    session.take_message()
        except ClosedByPeer:
            reason = "it has closed the connection"
        except ProtocolError as error:
            reason = str(error)
        except TooLate:
            reason = "it hangs in the middle of a message"
        finally:
            session.close()
        self._report(f"the client is gone: {reason}")


def _readable(sock: socket.socket) -> bool:
    return bool(select.select([sock], [], [], _LOOK)[0])


def _listen(path: str) -> tuple[socket.socket, int]:
    """Make the socket; return it and its inode."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        os.fchmod(listener.fileno(), 0o600)  # what the file gets, from its first moment on
        _bind(listener, path)
        listener.listen(_WAITING_CLIENTS)
        listener.setblocking(False)
        return listener, os.stat(path).st_ino
    except (OSError, ValueError) as error:
        listener.close()
        if isinstance(error, OSError) and error.errno == errno.ENOENT:
            reason = "there is no such directory; make it first"
        elif len(os.fsencode(path)) > 107:
            reason = "the path is too long for a socket: at most 107 bytes; use a relative one"
        else:
            reason = os.strerror(error.errno or 0) if isinstance(error, OSError) else str(error)
        raise TransportError(f"no server at {path!r}: {reason}") from error
    except BaseException:
        listener.close()
        raise


def _bind(listener: socket.socket, path: str) -> None:
    try:
        listener.bind(path)
        return
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise
    if not stat.S_ISSOCK(os.lstat(path).st_mode):
        raise TransportError(f"no server at {path!r}: there is something else of that name; choose another")
    if _is_served(path):
        raise TransportError(
            f"no server at {path!r}: another server is listening there; end it, or choose another path"
        )
    os.unlink(path)  # left behind by a server that ended without cleaning up
    listener.bind(path)


def _is_served(path: str) -> bool:
    try:
        connect_socket(path, timeout=1.0).close()
    except TransportError as error:
        return not isinstance(error.__cause__, ConnectionRefusedError)
    return True


def _remove(path: str, inode: int) -> None:
    try:
        if os.stat(path).st_ino == inode:  # not one that another server has made since
            os.unlink(path)
    except FileNotFoundError:
        pass
