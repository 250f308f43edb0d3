"""The server's end: starts one child process, exchanges frames with it and notices how it ends."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, Final, Generic, TypeVar

import structlog
from msgspec import Struct

from ash.domain.errors import ChildExited, FrameError
from ash.ipc.frames import MAX_FRAME_BYTES, FrameDecoder, FrameEncoder

Sent = TypeVar("Sent")
Received = TypeVar("Received")

_READ_BYTES: Final = 256 * 1024
_KEPT_LINES: Final = 60  # faulthandler's dump of all threads has up to 40
_FAULT: Final = "Fatal Python error"  # how faulthandler begins
_MAX_LINE_BYTES: Final = 4096
_EXIT_GRACE_S: Final = 5.0
"""How long a child may live after it closed its end of the channel before it is killed."""

_log = structlog.get_logger(__name__)


class ChildExit(Struct, frozen=True):
    """How a child ended. `code` is the exit status, or minus the signal's number.

    `cause` says why the server killed it, empty if it did not; `stderr` holds its last lines.
    """

    code: int
    cause: str
    stderr: tuple[str, ...]

    @property
    def signal_name(self) -> str | None:
        """Such as SIGKILL; None when no signal ended it."""
        if self.code >= 0:
            return None
        try:
            return signal.Signals(-self.code).name
        except ValueError:
            return f"signal {-self.code}"

    def describe(self) -> str:
        """One line for a log or an error message."""
        how = f"was ended by {self.signal_name}" if self.code < 0 else f"exited with status {self.code}"
        reason = self.cause or (self._last_words() if self.code != 0 else "")
        return f"{how} ({reason})" if reason else how

    def _last_words(self) -> str:
        """The line of stderr that tells most: the last one, or the one in front of faulthandler's dump."""
        faults = [number for number, line in enumerate(self.stderr) if line.startswith(_FAULT)]
        said = self.stderr[: max(1, faults[0])] if faults else self.stderr
        return said[-1] if said else ""


class ChildProcess(Generic[Sent, Received]):
    """One run of `python -m MODULE FD`, where FD is the child's end of a socket pair.

    Both callbacks run on the event loop and must not raise: `on_message` for every message in order, then
    `on_exit` exactly once, when the process has been reaped and every message was delivered. The child's
    stderr goes to the log line by line; its stdout is discarded. An object starts one process: make a new
    one to start again.

    Args:
        module: what the child runs.
        name: how logs and errors call it.
        payload_type: what the child's frames hold (see FrameDecoder).
        on_message: takes every message.
        on_exit: takes the end.
        environment: variables added to the server's own.
        max_frame_bytes: limit in both directions.
    """

    def __init__(
        self,
        module: str,
        *,
        name: str,
        payload_type: Any,
        on_message: Callable[[Received], None],
        on_exit: Callable[[ChildExit], None],
        environment: Mapping[str, str] | None = None,
        max_frame_bytes: int = MAX_FRAME_BYTES,
    ) -> None:
        self._module = module
        self._name = name
        self._on_message = on_message
        self._on_exit = on_exit
        self._environment = dict(environment or {})
        self._encoder = FrameEncoder(max_frame_bytes=max_frame_bytes)
        self._decoder: FrameDecoder[Received] = FrameDecoder(payload_type, max_frame_bytes=max_frame_bytes)
        self._process: asyncio.subprocess.Process | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._supervision: asyncio.Task[ChildExit] | None = None
        self._pidfd: int | None = None
        self._cause = ""
        self._stopping = False
        self._stderr: deque[str] = deque(maxlen=_KEPT_LINES)

    @property
    def pid(self) -> int | None:
        """The process id while the child runs."""
        if self._process is None or self._process.returncode is not None:
            return None
        return self._process.pid

    async def start(self) -> None:
        """Start the process. Returns as soon as it runs; what it says first is the caller's protocol.

        Raises:
            ChildExited: it could not be started at all.
        """
        if self._process is not None:
            raise ChildExited(f"{self._name} was already started; make a new one to start again")
        ours, theirs = socket.socketpair()
        try:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                self._module,
                str(theirs.fileno()),
                pass_fds=(theirs.fileno(),),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.DEVNULL,
                stderr=asyncio.subprocess.PIPE,
                env={**os.environ, **self._environment},
            )
            with contextlib.suppress(ProcessLookupError):  # it may have ended already
                self._pidfd = os.pidfd_open(self._process.pid)
            reader, self._writer = await asyncio.open_connection(sock=ours)
        except OSError as error:
            ours.close()
            raise ChildExited(f"{self._name} could not be started: {error}") from error
        finally:
            theirs.close()
        self._supervision = asyncio.create_task(
            self._supervise(self._process, reader), name=f"child {self._name}"
        )

    async def send(self, message: Sent) -> None:
        """Write `message` and wait until the child reads fast enough.

        Raises:
            ChildExited: the child is not running.
            FrameError: the message is too long.
        """
        self.post(message)
        assert self._writer is not None
        try:
            await self._writer.drain()
        except ConnectionError as error:
            raise ChildExited(f"{self._name} closed its channel: {error}") from error

    def post(self, message: Sent) -> None:
        """Write a small message without waiting, such as a cancellation.

        Raises:
            ChildExited: the child is not running.
            FrameError: the message is too long.
        """
        if self._writer is None or self._stopping or self._writer.is_closing():
            raise ChildExited(f"{self._name} is not running")
        self._writer.write(self._encoder.encode(message))

    def kill(self, cause: str) -> None:
        """End the process at once; `cause` becomes part of its ChildExit. Harmless when it has ended."""
        if self._process is None or self._process.returncode is not None or self._pidfd is None:
            return
        # Not Process.kill: it polls first, and a poll that finds the child dead takes away its exit status.
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
            self._cause = self._cause or cause

    async def stop(self, timeout_s: float = _EXIT_GRACE_S) -> ChildExit | None:
        """End the channel, which asks the child to leave; kill it when it takes longer than `timeout_s`.

        What the child still says is delivered. Returns how it ended, None if it never ran.
        """
        if self._supervision is None or self._writer is None:
            return None
        if not self._stopping and not self._writer.is_closing():
            self._stopping = True
            self._writer.write_eof()
        done, _ = await asyncio.wait({self._supervision}, timeout=timeout_s)
        if not done:
            self.kill(f"did not leave within {timeout_s:g} s")
        return await self.wait()

    async def wait(self) -> ChildExit:
        """How the child ended, once it has.

        Raises:
            ChildExited: it was never started.
        """
        if self._supervision is None:
            raise ChildExited(f"{self._name} was never started")
        return await asyncio.shield(self._supervision)

    async def _supervise(
        self, process: asyncio.subprocess.Process, reader: asyncio.StreamReader
    ) -> ChildExit:
        assert self._writer is not None
        logging = asyncio.create_task(self._keep_stderr(process), name=f"stderr of {self._name}")
        try:
            await self._deliver(reader)
            try:
                await asyncio.wait_for(process.wait(), _EXIT_GRACE_S)
            except TimeoutError:
                self.kill(f"closed its channel but still ran {_EXIT_GRACE_S:g} s later")
                await process.wait()
            # A grandchild may hold the pipe open for longer than we care to listen.
            await asyncio.wait({logging}, timeout=1.0)
        finally:
            # Without a return code we were cancelled: the event loop is torn down around us.
            self.kill("its supervision was cancelled")
            if self._pidfd is not None:
                os.close(self._pidfd)
                self._pidfd = None
            logging.cancel()
            self._writer.close()
        assert process.returncode is not None
        ended = ChildExit(code=process.returncode, cause=self._cause, stderr=tuple(self._stderr))
        self._on_exit(ended)
        return ended

    async def _deliver(self, reader: asyncio.StreamReader) -> None:
        try:
            while data := await reader.read(_READ_BYTES):
                for message in self._decoder.feed(data):
                    self._on_message(message)
        except FrameError as error:
            self.kill(f"sent what is no message: {error}")
        except ConnectionError:
            # It died with bytes of ours unread: its exit status tells more than this does.
            return
        except Exception as error:  # noqa: BLE001 - a faulty callback must not leave the child unsupervised
            _log.exception("a message of a child process could not be handled", child=self._name)
            self.kill(f"its message could not be handled: {error}")

    async def _keep_stderr(self, process: asyncio.subprocess.Process) -> None:
        assert process.stderr is not None
        pending = b""
        while data := await process.stderr.read(_READ_BYTES):
            *lines, pending = (pending + data).split(b"\n")
            for line in lines:
                self._keep_line(line, process.pid)
            if len(pending) > _MAX_LINE_BYTES:
                self._keep_line(pending, process.pid)
                pending = b""
        self._keep_line(pending, process.pid)

    def _keep_line(self, line: bytes, pid: int) -> None:
        text = line[:_MAX_LINE_BYTES].decode("utf-8", "replace").rstrip()
        if text:
            self._stderr.append(text)
            _log.warning("child process wrote to stderr", child=self._name, pid=pid, line=text)
