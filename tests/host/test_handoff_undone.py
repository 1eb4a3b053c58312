"""A handoff whose steps fail one after the other: everything before is undone, and every guest goes on where it was.

Live update itself is played by the test, so that it can fail where it likes; the lab has the real one.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Self

import pytest
from support.controls import goes_on, runtime_dir
from support.faultpoints import fault_points

from memconsole.actions import GuestStart, HandoffRun
from memconsole.backend import steps
from memconsole.backend.control import Control
from memconsole.backend.custody.holder import KeeperCustody
from memconsole.backend.handoff import bootplan, check, image, luo, manifest
from memconsole.errors import KernelRefused, MemconsoleError
from memconsole.model import HandoffState

M = 1 << 20
NAMES = ("one", "two")
pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="reads PFNs and rules guests: root")


class PlayedSession:
    """A session as the sequence sees it; ``preserved`` lists what every session was given."""

    preserved: list[tuple[str, int]] = []  # noqa: RUF012 - one list, emptied by every test

    def __init__(self, name: str) -> None:
        self.name = name
        self.fd = os.memfd_create(name)

    @classmethod
    def create(cls, name: str) -> Self:
        return cls(name)

    def preserve(self, fd: int, token: int) -> None:
        os.fstat(fd)
        self.preserved.append((self.name, token))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.fd)


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was loaded and unloaded, in order."""
    done: list[str] = []
    PlayedSession.preserved = []
    monkeypatch.setattr(luo, "LuoSession", PlayedSession)
    monkeypatch.setattr(image, "load", lambda *_: done.append("load"))
    monkeypatch.setattr(image, "unload", lambda: done.append("unload"))
    monkeypatch.setattr(check, "check_conditions", lambda _: ())
    return done


@pytest.fixture
def control() -> Iterator[Control]:
    with runtime_dir() as directory:
        with contextlib.closing(Control(directory, KeeperCustody.start(directory))) as found:
            try:
                for name in NAMES:
                    found.apply(GuestStart(name, memory=8 * M))
                    goes_on(found, name)
                yield found
            finally:
                for each in found.snapshot().guests:
                    if each.kind == "canary" and each.seen is not None and each.pid is not None:
                        os.kill(each.pid, 9)
        with contextlib.closing(KeeperCustody(directory / "keeper")) as last:
            last.end(holding=True)


def held(control: Control) -> list[str]:
    return control._desk.custody.names()


def test_a_jump_that_is_refused_undoes_everything(
    control: Control, loaded: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[bytes] = []

    def jump() -> None:
        fd, _ = control._desk.custody.get(bootplan.MANIFEST)
        seen.append(manifest.content(fd))
        os.close(fd)
        raise KernelRefused("reboot", 22, what="the loaded kernel was not booted", code="NotLoaded")

    monkeypatch.setattr(control._desk.custody, "jump", jump)
    before = held(control)
    with pytest.raises(KernelRefused) as refused:
        control.apply(HandoffRun())
    assert refused.value.code == "NotLoaded"
    assert loaded == ["load", "unload"]
    assert held(control) == before
    for name in NAMES:
        goes_on(control, name)
    report = control.snapshot().handoff
    assert report is not None
    assert report.state is HandoffState.FAILED
    plan = bootplan.decode(seen[0])
    names = {hold.name for hold in plan.holds}
    assert names == {"ledger", *(f"region:{name}:0" for name in NAMES), *(f"state:{name}" for name in NAMES)}
    assert {start.guest for start in plan.starts} == set(NAMES)
    preserved = {(hold.session, hold.token) for hold in plan.holds} | {(bootplan.MANIFEST_SESSION, 1)}
    assert sorted(PlayedSession.preserved) == sorted(preserved)


def test_a_failure_at_any_step_undoes_those_before_it(
    control: Control, loaded: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control._desk.custody, "jump", lambda: None)
    points = [point for point in fault_points(control.plan(HandoffRun())) if point.endswith("before")]
    assert len(points) >= 10
    before = held(control)
    for point in points:

        def fail(name: str, point: str = point) -> None:
            if name == point:
                raise MemconsoleError("it failed", point)

        monkeypatch.setattr(steps, "point", fail)
        with pytest.raises(MemconsoleError, match="it failed"):
            control.apply(HandoffRun())
        assert held(control) == before, point
        assert loaded.count("load") == loaded.count("unload"), point
        for name in NAMES:
            goes_on(control, name)
