"""QMP from any thread: qemu.qmp with its event loop hidden in a private thread, connected on first use."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qemu.qmp import ExecuteError, QMPClient, QMPError

from memconsole.errors import GuestError


class Qmp:
    """One QEMU's monitor on a unix socket."""

    def __init__(self, guest: str, path: Path) -> None:
        self._guest = guest
        self._path = path
        self._client: QMPClient | None = None
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name=f"memconsole-qmp-{guest}", daemon=True)
        self._thread.start()

    def execute(
        self, command: str, arguments: Mapping[str, object] | None = None, *, within: float, fd: int | None = None
    ) -> Any:
        """What QEMU returns for a command; ``fd`` goes with it.

        Raises:
            GuestError: it is not reachable, refused, or did not answer within so many seconds.
        """
        future = asyncio.run_coroutine_threadsafe(self._execute(command, arguments, within, fd), self._loop)
        try:
            return future.result()
        except ExecuteError as error:
            raise GuestError(f"guest {self._guest} refused {command}", str(error)) from None
        except TimeoutError:
            why = f"no answer to {command} within {within:g} s"
        except (QMPError, OSError) as error:
            why = f"{command}: {error}"
        raise GuestError(f"guest {self._guest} does not answer", why, "another monitor may hold its QMP socket")

    def close(self) -> None:
        """Disconnect and end the thread; QEMU goes on and waits for the next connection."""
        asyncio.run_coroutine_threadsafe(self._disconnect(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _execute(
        self, command: str, arguments: Mapping[str, object] | None, within: float, fd: int | None
    ) -> Any:
        try:
            async with asyncio.timeout(within):
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

    async def _disconnect(self) -> None:
        client, self._client = self._client, None
        if client is not None:
            with contextlib.suppress(QMPError, OSError, EOFError):
                await client.disconnect()
