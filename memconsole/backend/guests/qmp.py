"""QMP from any thread: qemu.qmp with its event loop hidden in a private thread, connected on first use."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Coroutine, Mapping
from concurrent.futures import CancelledError, Future
from pathlib import Path
from typing import Any

from qemu.qmp import ExecuteError, QMPClient, QMPError

from memconsole import unforeseen
from memconsole.backend.peers.patience import Patience
from memconsole.backend.peers.turns import Turn
from memconsole.errors import GuestError, Silent

_LOOK_S = 0.5
"""Seconds between two looks at what QEMU does, while it is waited for."""
_LEAVING_S = 1.0
"""Seconds a connection has to end in order; a monitor that reads nothing would keep it for ever."""


class Qmp:
    """One QEMU's monitor on a unix socket; one command at a time, in turn."""

    def __init__(self, guest: str, path: Path) -> None:
        self._guest = guest
        self._path = path
        self._client: QMPClient | None = None
        self._turn = Turn(f"the monitor of guest {guest}")
        self._gate = threading.Lock()
        self._closed = False
        self._under_way: Future[Any] | None = None
        self._loop = asyncio.new_event_loop()
        unforeseen.watch_tasks(self._loop, "memconsole-qmp")
        self._thread = unforeseen.thread(f"memconsole-qmp-{guest}", self._loop.run_forever)
        self._thread.start()

    def execute(
        self,
        command: str,
        arguments: Mapping[str, object] | None = None,
        *,
        within: float,
        fd: int | None = None,
        patience: Patience | None = None,
    ) -> Any:
        """What QEMU returns for a command; ``fd`` goes with it. Where there is patience, that and not the clock counts.

        Raises:
            GuestError: it is not reachable, refused, or did not answer within so many seconds; or another thread had
                its monitor all that time (``ConnectionBusy``).
        """
        try:
            with self._turn.taken(command, within) as left:
                return self._begin(self._execute(command, arguments, left, fd, patience)).result()
        except Silent as busy:
            raise GuestError(busy.what, busy.why, busy.remedy, code=busy.code) from None
        except ExecuteError as error:
            raise GuestError(f"guest {self._guest} refused {command}", str(error), "see its log") from None
        except CancelledError:
            raise GuestError(
                f"guest {self._guest} is not asked any more", f"{command} was under way", "try again"
            ) from None
        except TimeoutError:
            why = f"no answer to {command} within {within:g} s"
        except (QMPError, OSError, ValueError, RecursionError, MemoryError) as error:
            why = f"{command}: {error}"
        raise GuestError(f"guest {self._guest} does not answer", why, "close other monitors of its QMP socket")

    def close(self) -> None:
        """Disconnect and end the thread; QEMU goes on and waits for the next connection. Who waits for it stops."""
        with self._gate:
            if self._closed:
                return
            self._closed = True
            if self._under_way is not None:
                self._under_way.cancel()
        asyncio.run_coroutine_threadsafe(self._end(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _begin(self, command: Coroutine[Any, Any, Any]) -> Future[Any]:
        with self._gate:
            if self._closed:
                command.close()
                raise CancelledError
            self._under_way = asyncio.run_coroutine_threadsafe(command, self._loop)
            return self._under_way

    async def _execute(
        self,
        command: str,
        arguments: Mapping[str, object] | None,
        within: float,
        fd: int | None,
        patience: Patience | None,
    ) -> Any:
        try:
            async with asyncio.timeout(within) as limit, _extended(limit, patience):
                if self._client is None:
                    client = QMPClient(self._guest)
                    await client.connect(str(self._path))
                    self._client = client
                if fd is not None:
                    self._client.send_fd_scm(fd)
                return await self._client.execute(command, dict(arguments or {}))
        except ExecuteError:
            raise
        except BaseException:
            await self._disconnect()
            raise

    async def _end(self) -> None:
        await self._disconnect()
        left = asyncio.all_tasks() - {asyncio.current_task()}
        if left:  # of a command that was cancelled
            await asyncio.wait(left, timeout=_LEAVING_S)

    async def _disconnect(self) -> None:
        client, self._client = self._client, None
        if client is not None:
            with contextlib.suppress(QMPError, OSError, EOFError, TimeoutError):
                async with asyncio.timeout(_LEAVING_S):
                    await client.disconnect()


@contextlib.asynccontextmanager
async def _extended(limit: asyncio.Timeout, patience: Patience | None) -> AsyncIterator[None]:
    """Put a limit off while QEMU is busy, or waits for a processor."""

    async def extend(patience: Patience) -> None:
        while left := patience.left():
            limit.reschedule(asyncio.get_running_loop().time() + left + _LOOK_S)
            await asyncio.sleep(_LOOK_S)

    looking = asyncio.create_task(extend(patience)) if patience is not None else None
    try:
        yield
    finally:
        if looking is not None:
            looking.cancel()
