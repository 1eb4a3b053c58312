"""What an action, an adoption, a handoff or a revoke did, a line a step: when, how long it took, how it ended.

    line        = "step" fields / "suppressed" fields
    step        action=ACTION step=STEP state=begins does=TEXT
                action=ACTION step=STEP state=done|passed seconds=S
                action=ACTION step=STEP state=failed seconds=S error=CODE why=TEXT
                action=ACTION step=STEP state=undoes|undone|not-undone ...
    suppressed  action=ACTION step=STEP during=TEXT error=CODE why=TEXT
    value       letters, digits and -._:/=, else a JSON string

``passed`` is a point inside of a step; its seconds are those since the line before it. An error that ends nothing is
told once an action, however often it is met. The lines go where the service's log goes: the journal, or ``serve.log``.
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
import time
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import NamedTuple

from memconsole.errors import MemconsoleError

log = logging.getLogger("memconsole.steps")
log.addHandler(logging.NullHandler())  # where nothing is logged, a step that failed is told by its error alone

_PLAIN = re.compile(r"[\w.:/=-]+", re.ASCII)


class _Words(NamedTuple):
    begins: str
    ends: str
    fails: str


_DOING = _Words("begins", "done", "failed")
_UNDOING = _Words("undoes", "undone", "not-undone")


@dataclass
class _Scope:
    """What is under way in this thread, since when its last line is, and which errors were told of it."""

    action: str
    step: str = ""
    last: float = field(default_factory=time.monotonic)
    told: set[tuple[str, str, str]] = field(default_factory=set)

    def lap(self) -> float:
        """Seconds since the last lap."""
        before, self.last = self.last, time.monotonic()
        return self.last - before


_scope: ContextVar[_Scope | None] = ContextVar("memconsole-steps", default=None)


@contextlib.contextmanager
def running(action: str) -> Iterator[None]:
    """What is logged inside belongs to this action, or to the one that is under way already."""
    with _under(action):
        yield


@contextlib.contextmanager
def passing(action: str, step: str, does: str = "", *, undo: bool = False) -> Iterator[None]:
    """A step, or the undoing of one: that it begins, and how it ended after how many seconds."""
    words = _UNDOING if undo else _DOING
    with _under(action) as scope:
        outer, scope.step = scope.step, step
        scope.last = began = time.monotonic()
        _say(logging.INFO, "step", action=action, step=step, state=words.begins, does=does)
        try:
            yield
        except BaseException as error:
            took = _seconds(time.monotonic() - began)
            _say(logging.WARNING, "step", action=action, step=step, state=words.fails, seconds=took, **_said(error))
            raise
        else:
            took = _seconds(time.monotonic() - began)
            _say(logging.INFO, "step", action=action, step=step, state=words.ends, seconds=took)
        finally:
            scope.step, scope.last = outer, time.monotonic()


def passed(name: str) -> None:
    """A point inside of a step, ``ACTION.STEP``, was passed; how many seconds after the line before it."""
    action, _, step = name.partition(".")
    scope = _scope.get()
    took = _seconds(scope.lap()) if scope is not None else ""
    _say(logging.INFO, "step", action=action, step=step, state="passed", seconds=took)


class suppressed:  # noqa: N801 - it is used as contextlib.suppress is
    """End errors of these kinds at the end of this body, each told once an action; ``during`` says what was tried."""

    def __init__(self, during: str, *kinds: type[BaseException]) -> None:
        self._during = during
        self._kinds = kinds

    def __enter__(self) -> None:
        """Begin; there is nothing to give."""

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> bool:
        """Whether the error ends here."""
        if not isinstance(error, self._kinds):
            return False
        scope = _scope.get() or _Scope("")
        said = _said(error)
        known = self._during, said["error"], said["why"]
        if known not in scope.told:
            scope.told.add(known)
            _say(logging.WARNING, "suppressed", action=scope.action, step=scope.step, during=self._during, **said)
        return True


@contextlib.contextmanager
def _under(action: str) -> Iterator[_Scope]:
    """The scope that is open, or a new one for this action."""
    scope = _scope.get()
    if scope is not None:
        yield scope
        return
    scope = _Scope(action)
    token = _scope.set(scope)
    try:
        yield scope
    finally:
        _scope.reset(token)


def _said(error: BaseException) -> dict[str, str]:
    code = error.code if isinstance(error, MemconsoleError) else type(error).__name__
    return {"error": code, "why": str(error)}


def _seconds(count: float) -> str:
    return f"{count:.6f}"


def _say(level: int, what: str, **fields: str) -> None:
    """One line; a field without a value is left out."""
    if log.isEnabledFor(level):
        log.log(level, "%s", " ".join([what, *(f"{name}={_value(text)}" for name, text in fields.items() if text)]))


def _value(text: str) -> str:
    return text if _PLAIN.fullmatch(text) else json.dumps(text, ensure_ascii=False)
