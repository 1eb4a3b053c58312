"""What becomes of an exception that was not foreseen: it ends the one call it belongs to, and nothing else.

It is logged with its trace, counted by place (``memconsole_unforeseen_total`` in the metrics), and becomes a named
error, ``Internal``, for whoever waits for an answer. Everything that runs beside the main thread goes through here:

=================== ============================================================================================
:func:`attempt`     a call whose answer is wanted: its value, or the named error
:func:`contained`   a part of a loop that must go on: its error is the end of that part
:func:`thread`      a thread of the project's own
:func:`watch`       once a process: what leaves the threads and destructors of libraries
:func:`watch_tasks` what leaves the tasks of an asyncio loop
=================== ============================================================================================
"""

from __future__ import annotations

import contextlib
import logging
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args

from memconsole.errors import MemconsoleError

if TYPE_CHECKING:
    import asyncio

log = logging.getLogger("memconsole")

CODE = "Internal"

Place = Literal["agents", "call", "console", "job", "loop", "survey", "thread"]
"""Where a call ended: of a guest's agent, of a client, of an operator; a job; a turn of the service's loop; a Snapshot
as it was taken; a thread."""

T = TypeVar("T")

_counted: Counter[Place] = Counter()
_counting = threading.Lock()


def named(error: BaseException, during: str, place: Place) -> MemconsoleError:
    """The named error for an exception: itself where it has a name, else ``Internal``, logged and counted.

    ``during`` says what failed, ``place`` what it is counted under.
    """
    if isinstance(error, MemconsoleError):
        return error
    note(error, during, place)
    return MemconsoleError(
        f"{during} failed",
        f"{type(error).__name__}: {error}",
        "this is a fault of memconsole, and ended this call alone: report it with the trace in the log",
        code=CODE,
    )


def note(error: BaseException, during: str, place: Place) -> None:
    """Log an exception with its trace, and count it."""
    with _counting:
        _counted[place] += 1
    log.error("%s failed", during, exc_info=error)


def counts() -> Mapping[str, int]:
    """How many there were since this process began, by place."""
    with _counting:
        return {place: _counted[place] for place in get_args(Place)}


def attempt(during: str, place: Place, call: Callable[[], T]) -> T | MemconsoleError:
    """What a call returns, or the named error of what it raised."""
    try:
        return call()
    except Exception as error:  # noqa: BLE001 - this is where it ends
        return named(error, during, place)


@contextlib.contextmanager
def contained(during: str, place: Place) -> Iterator[None]:
    """End an exception that was not foreseen at the end of this body; errors with a name are logged as warnings."""
    try:
        yield
    except MemconsoleError as error:
        log.warning("%s failed: %s", during, error)
    except Exception as error:  # noqa: BLE001 - this is where it ends
        note(error, during, place)


def thread(name: str, run: Callable[[], None]) -> threading.Thread:
    """A daemon thread, not yet started; what leaves ``run`` ends it, logged and counted."""

    def contain() -> None:
        with contained(f"the thread {name}", "thread"):
            run()

    return threading.Thread(target=contain, name=name, daemon=True)


def watch_tasks(loop: asyncio.AbstractEventLoop, name: str) -> None:
    """Log and count what the tasks of an asyncio loop leave unhandled."""

    def handle(_: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        error = context.get("exception")
        if isinstance(error, Exception):
            note(error, f"{name}: {context['message']}", "thread")
        else:
            log.warning("%s: %s", name, context["message"])

    loop.set_exception_handler(handle)


def watch() -> None:
    """Log and count what leaves threads and destructors that are not the project's own."""

    def of_thread(args: threading.ExceptHookArgs) -> None:
        if args.exc_value is not None and not isinstance(args.exc_value, SystemExit):
            note(args.exc_value, f"the thread {args.thread.name if args.thread else 'unknown'}", "thread")

    def of_destructor(args: sys.UnraisableHookArgs) -> None:
        if args.exc_value is not None:
            note(args.exc_value, args.err_msg or f"the end of {type(args.object).__name__}", "thread")

    threading.excepthook = of_thread
    sys.unraisablehook = of_destructor
