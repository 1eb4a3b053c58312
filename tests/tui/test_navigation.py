"""Going places: views by number, details and back, command line, palette, help, keymap, a source that fails."""

import msgspec
import pytest
from support import synthetic
from support.console import (
    SMALL,
    WIDE,
    console,
    current_table,
    focused,
    refreshed,
    running,
    selected,
    shown,
    synthetic_source,
    toasts,
    type_text,
    until,
)
from support.synthetic import SyntheticSource
from textual.containers import VerticalScroll

from memconsole import glossary
from memconsole.errors import NoControl, UsageError
from memconsole.model import Snapshot
from memconsole.views.app import ConsoleApp
from memconsole.views.following import SnapshotArrived
from memconsole.views.places import Place
from memconsole.views.screens.acting import Confirmation
from memconsole.views.screens.dialogs import Confirm
from memconsole.views.screens.help import Help
from memconsole.views.settings import ConsoleSettings
from memconsole.views.widgets.prompt import Prompt

SOMETHING = {
    "1": "Ready to hand off?",
    "2": "web0-ram0",
    "3": "qemu",
    "4": "g1",
    "5": "guest:web0",
    "6": "Physical address map",
    "7": "DMA-FQ",
    "8": "reserved db1-ram2",
    "9": "GuestGone",
}


@pytest.mark.parametrize("size", [SMALL, WIDE])
async def test_every_view_opens_by_its_number_and_shows_what_it_is_about(size: tuple[int, int]) -> None:
    app = console()
    async with running(app, size) as pilot:
        for key, text in SOMETHING.items():
            await pilot.press(key)
            assert text in shown(app), f"view {key} at {size}"
            lines = shown(app).splitlines()
            assert len(lines) == size[1]
            assert "? Help" in lines[-1]


async def test_tab_goes_from_table_to_table_and_the_title_speaks_of_the_one_in_use() -> None:
    app = console()
    async with running(app) as pilot:
        for key, count in (("6", "6"), ("tab", "3"), ("tab", "5"), ("shift+tab", "3")):
            await pilot.press(key)
            assert shown(app).splitlines()[2].split() == ["MMIO", count]


async def test_an_empty_host_is_shown_in_words() -> None:
    full = synthetic.snapshot()
    empty = Snapshot(taken_ns=full.taken_ns, host=full.host, memory=full.memory)
    app = console(SyntheticSource(empty))
    async with running(app) as pilot:
        assert "? not known to be ready: the conditions of a handoff were not checked" in shown(app)
        assert "absent (no kho=on)" in shown(app)
        assert "✔ no findings" in shown(app)
        for key, words in {"2": "n reserves one", "3": "a attaches a running process", "7": "no IOMMU groups"}.items():
            await pilot.press(key)
            assert words in shown(app)


async def test_drilling_down_and_coming_back_keeps_the_place() -> None:
    app = console()
    async with running(app) as pilot:
        await pilot.press("3", "down", "enter")
        assert "Guests ▸ guest db1" in shown(app)
        assert "/memfd:db1-ram0 (deleted)" in shown(app)
        await pilot.press("enter")
        assert "Guests ▸ guest db1 ▸ region db1-ram0" in shown(app)
        await pilot.press("enter")
        assert "▸ grant g2" in shown(app)
        await pilot.press("escape", "backspace", "escape")
        assert app.trail == [Place("guests")]
        assert selected(app).name == "db1"
        assert app.focused is app.view.current_table
        await pilot.press("escape")
        assert app.trail == [Place("guests")]


async def test_a_detail_lives_and_outlives_its_entity() -> None:
    app = console()
    async with running(app) as pilot:
        await pilot.press("3", "enter")
        assert "Beats       1,000" in shown(app)
        await refreshed(pilot, app, synthetic.snapshot(beats=1500))
        assert "Beats      •1,500" in shown(app)
        await refreshed(pilot, app, synthetic.snapshot(guests=0))
        assert "✖ guest:web0 is gone; this is what it was" in shown(app)
        assert "Beats" in shown(app)
        assert app.screen.active_bindings["S"].enabled is False


async def test_a_region_leads_to_its_pfn_map_and_back() -> None:
    app = console()
    async with running(app) as pilot:
        await pilot.press("2", "enter", "f")
        await until(pilot, lambda: "64 runs" in shown(app))
        assert "Regions ▸ region web0-ram0 ▸ PFN region web0-ram0" in shown(app)
        await pilot.press("escape")
        assert app.trail[-1] == Place("region", "region:web0-ram0")


async def test_a_finding_leads_to_what_it_is_about() -> None:
    app = console()
    async with running(app) as pilot:
        await pilot.press("9", "enter", "o")
        assert app.trail[-1] == Place("guest", "guest:db1"), "the error comes first"


async def test_macros_and_commands_open_views_by_name() -> None:
    app = console()
    async with running(app) as pilot:
        app.open_view("regions", "region:db1-ram0")
        assert app.trail == [Place("regions"), Place("region", "region:db1-ram0")]
        app.open_view("regions", "spare")
        assert current_table(app).rows.filter_text == "spare"
        app.open_view("windows")
        assert app.trail == [Place("mmio")]
        app.open_view("guest", "db1")
        assert app.trail == [Place("guests"), Place("guest", "guest:db1")]
        with pytest.raises(UsageError):
            app.open_view("nowhere")
        await pilot.pause()
        assert app.journal[0] == ("regions", "region:db1-ram0")


async def test_a_place_that_is_not_there_says_so() -> None:
    app = console()
    async with running(app) as pilot:
        app.open_view("region", "nothing")
        await pilot.pause()
        assert "there is no region:nothing in this snapshot" in shown(app)


# --- the command line, the palette, help ----------------------------------------------------------------------------


async def test_the_command_line_opens_views_and_plans_actions() -> None:
    app = console()
    async with running(app) as pilot:
        await pilot.press("colon")
        await type_text(pilot, "audit")
        await pilot.press("enter")
        assert app.trail == [Place("audit")]
        await pilot.press("colon")
        await type_text(pilot, "reserve new 64M --page-size 2M")
        await pilot.press("enter")
        await until(
            pilot,
            lambda: (
                isinstance(app.screen, Confirmation) and "$ memconsole reserve new 64M --page-size 2M" in shown(app)
            ),
        )


async def test_the_command_line_completes_and_remembers() -> None:
    app = console()
    async with running(app) as pilot:
        await pilot.press("colon")
        await type_text(pilot, "guest pau")
        await until(pilot, lambda: focused(app, Prompt)._suggestion == "guest pause")
        await pilot.press("tab", "space")
        await type_text(pilot, "we")
        await until(pilot, lambda: focused(app, Prompt)._suggestion == "guest pause web0")
        await pilot.press("tab", "enter")
        await until(pilot, lambda: isinstance(app.screen, Confirmation))
        await pilot.press("escape", "colon", "up")
        assert focused(app, Prompt).value == "guest pause web0"


@pytest.mark.parametrize("line", ["frobnicate", "reserve", "reserve web 64Q", "theme none", "'open", "macro none x"])
async def test_a_command_that_means_nothing_stays_to_be_corrected(line: str) -> None:
    app = console()
    async with running(app) as pilot:
        await pilot.press("colon")
        focused(app, Prompt).value = line
        await pilot.press("enter")
        assert focused(app).id == "prompt"
        assert focused(app, Prompt).value == line
        assert "✖ Command" in toasts(app)
        await pilot.press("escape")
        assert app.focused is app.view.first_focus


async def test_the_palette_reaches_every_action_and_view() -> None:
    from memconsole import actions
    from memconsole.views.commands import entries

    app = console()
    async with running(app) as pilot:
        names = {entry.name for entry in entries(app)}
        assert {cls.spec.title for cls in actions.REGISTRY.values()} <= names
        assert {f"Go to {view.title}" for view in app.VIEWS} <= names
        await pilot.press("3", "down", "ctrl+p")
        await type_text(pilot, "pause guest")
        await until(pilot, lambda: "Pause guest" in shown(app))
        await pilot.pause(0.3)
        await pilot.press("enter")
        await until(pilot, lambda: isinstance(app.screen, Confirmation) and "guest pause db1" in shown(app))


async def test_help_lists_the_keys_that_work_here_with_their_ids() -> None:
    app = console()
    async with running(app) as pilot:
        await pilot.press("2", "question_mark")
        assert isinstance(app.screen, Help)
        text = shown(app)
        assert "Regions" in text
        assert "Set memory aside under a name" in text
        assert "reserve" in text
        assert "Page Left" not in text
        await pilot.press("escape")
        assert app.screen is app.screen_stack[0]


async def test_help_ends_with_what_every_word_means() -> None:
    app = console()
    async with running(app) as pilot:
        await pilot.press("question_mark")
        app.screen.query_one(VerticalScroll).scroll_end(animate=False)
        await pilot.pause()
        text = shown(app)
        for term in glossary.TERMS[-3:]:
            assert term.word in text
            assert term.meaning[:40] in text


async def test_keys_can_be_given_to_other_actions() -> None:
    app = console(settings=ConsoleSettings(keys={"reserve": "K", "view-guests": "ctrl+g"}))
    async with running(app) as pilot:
        await pilot.press("2")
        active = app.screen.active_bindings
        assert active["K"].binding.id == "reserve"
        assert "n" not in active
        await pilot.press("ctrl+g")
        assert app.trail == [Place("guests")]


async def test_a_theme_from_the_settings_is_used() -> None:
    app = console(settings=ConsoleSettings(theme="ansi-dark"))
    async with running(app):
        assert app.theme == "ansi-dark"


# --- the source -----------------------------------------------------------------------------------------------------


async def test_a_source_that_fails_is_shown_with_the_age_of_the_data_and_comes_back() -> None:
    now = [synthetic.NOW_NS]
    source = SyntheticSource()
    app = console(source, clock=lambda: now[0])
    async with running(app) as pilot:
        await pilot.press("2")
        source.fail["snapshot"] = NoControl("the control process does not answer")
        app.action_refresh()
        await until(pilot, lambda: bool(app.trouble))
        now[0] += 12_000_000_000
        app.show_state()
        await pilot.pause()
        assert "✖ the control process does not answer, 12s old" in shown(app)
        assert "web0-ram0" in shown(app)
        await pilot.press("down")
        assert selected(app).name == "db1-ram0"
        del source.fail["snapshot"]
        app.action_refresh()
        await until(pilot, lambda: not app.trouble)
        assert "● live" in shown(app)


async def test_what_three_intervals_brought_nothing_newer_of_is_stale_in_every_view() -> None:
    now = [synthetic.NOW_NS]
    app = console(clock=lambda: now[0], interval=10)
    async with running(app) as pilot:
        now[0] += 29_000_000_000
        app.show_state()
        await pilot.pause()
        assert "● live" in shown(app)
        now[0] += 2_000_000_000
        app.workers.cancel_group(app, "follow")  # a view that shows more asks for it at once
        for key in "1234567890":
            await pilot.press(key)
            app.show_state()
            await pilot.pause()
            assert "▲ stale, 31s old" in shown(app)
            assert "live" not in shown(app).splitlines()[0]
        app.follow()
        await until(pilot, lambda: "● live" in shown(app))


async def test_a_survey_that_takes_long_is_waited_for_by_its_own_measure() -> None:
    now = [synthetic.NOW_NS]
    app = console(clock=lambda: now[0], interval=1)
    async with running(app) as pilot:
        app.workers.cancel_group(app, "follow")
        app.post_message(SnapshotArrived(synthetic.snapshot(), took_s=8.0))
        await until(pilot, lambda: app.took_s == 8.0)
        now[0] += 20_000_000_000
        app.show_state()
        await pilot.pause()
        assert "● live" in shown(app)
        now[0] += 5_000_000_000
        app.show_state()
        await pilot.pause()
        assert "▲ stale, 25s old" in shown(app)


async def test_a_source_that_fails_from_the_start_is_no_crash() -> None:
    source = SyntheticSource()
    source.fail["snapshot"] = NoControl("nobody is there")
    app = console(source)
    async with running(app) as pilot:
        for key in "123456789":
            await pilot.press(key)
        assert "✖ nobody is there" in shown(app)
        assert "waiting for the first snapshot" in shown(app)
        del source.fail["snapshot"]
        app.action_refresh()
        await until(pilot, lambda: "GuestGone" in shown(app))


async def test_a_fault_in_the_source_is_shown_and_the_source_is_asked_again() -> None:
    source = SyntheticSource()
    app = console(source)
    async with running(app, faults=True) as pilot:
        source.fail["snapshot"] = ZeroDivisionError("oops")
        app.interval = 0.05
        app.action_refresh()
        await until(pilot, lambda: "ZeroDivisionError: oops" in shown(app))
        del source.fail["snapshot"]
        await until(pilot, lambda: not app.trouble)


async def test_the_picture_stands_still_while_it_is_paused() -> None:
    app = console()
    async with running(app) as pilot:
        await pilot.press("3", "P")
        assert "‖ paused, under a second old" in shown(app)
        synthetic_source(app).show(synthetic.snapshot(beats=9000))
        await pilot.pause(0.1)
        assert "9,000" not in shown(app)
        await pilot.press("r")
        await until(pilot, lambda: "9,000" in shown(app))
        await pilot.press("P")
        assert "● live" in shown(app)


# --- leaving --------------------------------------------------------------------------------------------------------


def asks(app: ConsoleApp) -> bool:
    return isinstance(app.screen, Confirm)


async def test_leaving_asks_when_it_would_lose_something() -> None:
    app = console(on_quit_warning=lambda: "2 guests end with this console")
    async with running(app) as pilot:
        await pilot.press("q")
        assert asks(app)
        assert "2 guests end with this console" in shown(app)
        await pilot.press("enter")
        assert app.is_running
        await pilot.press("q", "n")
        assert not asks(app)
        await pilot.press("q", "right", "left", "enter")
        assert app.is_running
        await pilot.press("q", "tab", "enter")
        await until(pilot, lambda: app._exit)


@pytest.mark.parametrize("keys", [("y",), ("right", "enter")])
async def test_leaving_is_a_key_away(keys: tuple[str, ...]) -> None:
    app = console(on_quit_warning=lambda: "2 guests end with this console")
    async with running(app) as pilot:
        await pilot.press("q", *keys)
        await until(pilot, lambda: app._exit)


async def test_leaving_asks_nothing_when_nothing_is_lost() -> None:
    app = console()
    async with running(app) as pilot:
        await pilot.press("q")
        await until(pilot, lambda: app._exit)


async def test_memory_that_survives_is_said_in_words() -> None:
    full = synthetic.snapshot()
    survival = msgspec.structs.replace(full.survival, kho=True, luo=True, kexec_count=3)
    app = console(SyntheticSource(msgspec.structs.replace(full, survival=survival)))
    async with running(app):
        assert "✔ the kernel hands over" in shown(app)
        assert "✔ /dev/liveupdate is there" in shown(app)
        assert "3 since power-on" in shown(app)


async def test_a_key_of_another_meaning_is_not_taken_and_it_is_said() -> None:
    app = console(settings=ConsoleSettings(keys={"refresh": "c", "nosuch": "x"}))
    async with running(app) as pilot:
        await pilot.press("2")
        assert app.screen.active_bindings["c"].binding.id == "columns"
        assert app.screen.active_bindings["r"].binding.id == "refresh"
        assert "refresh: c cannot be refresh, it is columns already" in toasts(app)
        assert "nosuch: no key has the id 'nosuch'" in toasts(app)


async def test_the_vim_map_moves_by_its_keys_and_keeps_the_others() -> None:
    app = console(settings=ConsoleSettings(keymap="vim"))
    async with running(app) as pilot:
        await pilot.press("2", "G")
        table = app.view.current_table
        assert table is not None
        last = table.cursor
        assert last == len(table.rows) - 1 > 0
        await pilot.press("ctrl+u")
        assert table.cursor < last
        await pilot.press("enter")
        assert len(app.trail) == 2
        await pilot.press("ctrl+o")
        assert app.trail == [Place("regions")]


async def test_the_arrows_map_leaves_letters_alone() -> None:
    app = console(settings=ConsoleSettings(keymap="arrows"))
    async with running(app) as pilot:
        await pilot.press("2", "j", "G")
        table = app.view.current_table
        assert table is not None
        assert table.cursor == 0
        await pilot.press("down")
        assert table.cursor == 1


@pytest.mark.parametrize("size", [SMALL, (60, 20)])
async def test_a_dead_service_is_told_in_full_with_remedy_and_age(
    size: tuple[int, int],
) -> None:
    now = [synthetic.NOW_NS]
    source = SyntheticSource()
    app = console(source, clock=lambda: now[0])
    async with running(app, size) as pilot:
        source.fail["snapshot"] = NoControl(
            "the control process at /run/memconsole/control does not answer",
            "its socket refuses connections",
            "start it: systemctl start memconsole, and look at journalctl -u memconsole",
        )
        app.action_refresh()
        await until(pilot, lambda: bool(app.trouble))
        now[0] += 12_000_000_000
        app.show_state()
        await until(pilot, lambda: "12s old" in shown(app).splitlines()[0])
        said = " ".join(line.strip() for line in shown(app).splitlines()[3:8])
        assert "its socket refuses connections" in said
        assert "and look at journalctl -u memconsole" in said
        assert "12s old" in said
        del source.fail["snapshot"]
        app.action_refresh()
        await until(pilot, lambda: "journalctl" not in shown(app))
