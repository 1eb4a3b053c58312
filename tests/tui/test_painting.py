"""What is done while a key waits for its frame, and what is done behind it."""

from __future__ import annotations

import gc
from collections.abc import Callable

import pytest
from support import synthetic
from support.console import console, running, until

from memconsole.model import Snapshot
from memconsole.views.following import SnapshotArrived
from memconsole.views.widgets.table import VirtualTable


async def test_behind_a_keys_frame_is_what_would_hold_it_up(monkeypatch: pytest.MonkeyPatch) -> None:
    app = console()
    said: list[tuple[str, bool]] = []

    def saying(word: str) -> Callable[[], None]:
        return lambda: said.append((word, gc.isenabled()))

    async with running(app) as pilot:
        move = VirtualTable.action_move

        def moves(table: VirtualTable, by: int) -> None:
            app.behind_frame(saying("behind"))
            app.before_frame(saying("before"))
            move(table, by)

        monkeypatch.setattr(VirtualTable, "action_move", moves)
        await pilot.press("2", "down")
        await until(pilot, lambda: len(said) == 2)
        assert said == [("before", False), ("behind", True)]
        app.behind_frame(saying("at once"))
        assert said[-1] == ("at once", True)


async def test_a_snapshot_that_comes_amid_a_key_is_shown_behind_its_frame(monkeypatch: pytest.MonkeyPatch) -> None:
    app = console()
    async with running(app) as pilot:
        await pilot.press("2")
        newer = synthetic.snapshot(regions=3)
        known: list[bool] = []
        shown: list[Snapshot] = []
        show = app._show_arrived

        def shows(event: SnapshotArrived) -> None:
            shown.append(event.snapshot)
            show(event)

        monkeypatch.setattr(app, "_show_arrived", shows)

        def moves(table: VirtualTable, by: int) -> None:
            app.on_snapshot_arrived(SnapshotArrived(newer))
            known.append(newer in shown)

        monkeypatch.setattr(VirtualTable, "action_move", moves)
        await pilot.press("down")
        await until(pilot, lambda: newer in shown)
        assert known == [False]


async def test_garbage_is_looked_for_again_once_the_console_has_ended() -> None:
    app = console()
    async with running(app) as pilot:
        await pilot.press("2", "q")
    assert gc.isenabled()
