"""Many hosts as one: what is joined, who is asked, what one that fails or hangs costs the others."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import pytest
from msgspec.structs import replace
from support.fleets import fleet_of, member
from support.remotes import as_ssh, memconsole_in
from support.served import ServedSource
from support.synthetic import NOW_NS, SyntheticSource, snapshot
from support.waiting import LONG_S, until

from memconsole import actions as do
from memconsole import recording
from memconsole.backend.wire.serving import serve_in_thread
from memconsole.cli import hosting, main
from memconsole.cli.inside import Inside
from memconsole.errors import ExitCode, NoControl, NotFound, Refused
from memconsole.fields import TABLES
from memconsole.fleet import Fleet, HostState, Member, hosted, joined, split
from memconsole.macro_run import Ran
from memconsole.source import Source
from memconsole.views import opening
from memconsole.views.places import Place


def test_names_of_a_joined_snapshot_have_their_host_and_still_fit_each_other() -> None:
    fleet, sources = fleet_of(2)
    with closing(fleet):
        found = fleet.snapshot()
        one = sources[0].snapshot()
    assert [each.name for each in found.regions] == [f"h{n}/{r.name}" for n in (1, 2) for r in one.regions]
    names, ids = {each.name for each in found.guests}, {each.id for each in found.grants}
    assert {each.guest for each in found.grants} <= names
    assert {grant for each in found.regions for grant in each.grants} <= ids
    assert len({event.seq for event in found.events}) == 2 * len(one.events)
    assert found.memory.total == 2 * one.memory.total
    assert fleet.snapshot() is found, "nothing new came"


def test_what_a_host_shows_as_before_is_joined_as_before() -> None:
    found = snapshot()
    changed = replace(found.guests[0], memory=4096)
    then = replace(found, guests=(changed, *found.guests[1:]), regions=found.regions[:-1])
    before = joined("h1", found)
    after = joined("h1", then, (found, before))
    assert after == joined("h1", then)
    assert [old is new for old, new in zip(before.guests, after.guests, strict=True)] == [False, True, True]
    assert after.guests[0].memory == 4096
    assert all(old is new for old, new in zip(before.regions, after.regions, strict=False))
    assert after.grants is before.grants


def test_a_table_shows_the_host_first_and_names_without_it() -> None:
    table = hosted(TABLES["grants"])
    found = joined("h1", snapshot())
    row = found.grants[0]
    shown = {field.id: field.text(row) for field in table.fields}
    assert table.fields[0].id == "host"
    assert (shown["host"], shown["id"], shown["guest"]) == ("h1", "g1", split(row.guest)[1])
    assert table.key(row) == "h1/g1"
    finding = found.findings[0]
    assert {field.id: field.text(finding) for field in hosted(TABLES["findings"]).fields}["id"] == finding.id


def test_an_action_goes_to_the_host_in_its_names_and_nowhere_else() -> None:
    fleet, sources = fleet_of(3)
    with closing(fleet):
        plan = fleet.plan(do.Revoke("h2/g1"))
        assert not plan.refusals
        assert plan.cli.startswith("memconsole --host h2 revoke g1")
        fleet.apply(do.Revoke("h2/g1"))
        assert [len(each.applied) for each in sources] == [0, 1, 0]
        for action in (do.Map("h1/a", "h2/b"), do.Reserve("new", 4096), do.HandoffRun(), do.Revoke("g1")):
            (refusal,) = fleet.plan(action).refusals
            assert refusal.code == "OneHost"
            with pytest.raises(Refused):
                fleet.apply(action)
        assert fleet.plan(do.Revoke("nosuch/g1")).refusals[0].code == "NotFound"
        with fleet.extents("region:h3/" + sources[2].snapshot().regions[0].name) as table:
            assert len(table)
    assert [len(each.applied) for each in sources] == [0, 1, 0]


def test_a_host_that_hangs_or_fails_delays_no_other() -> None:
    release = threading.Event()

    def hangs() -> Source:
        assert release.wait(LONG_S)
        raise NoControl("it hung", "", "")

    def fails() -> Source:
        raise NoControl("h3 cannot be reached", "no route to host", "see whether it is up")

    good = SyntheticSource()
    fleet = Fleet([Member("h1", lambda: good), member("h2", hangs), member("h3", fails)], interval=0.05)
    with closing(fleet):
        fleet.start()
        until(lambda: good.calls.count("snapshot") > 3, "the one that answers is asked again and again")
        until(lambda: fleet.hosts()[2].state is HostState.LOST, "the one that fails is lost")
        rows = fleet.hosts()
        assert [row.state for row in rows] == [HostState.LIVE, HostState.CONNECTING, HostState.LOST]
        assert "no route to host" in rows[2].why
        assert {split(each.name)[0] for each in fleet.snapshot().regions} == {"h1"}
        with pytest.raises(NotFound):
            fleet.source_of("h2")
        release.set()


def test_what_was_said_last_stands_with_its_age_when_a_host_is_lost() -> None:
    fleet, sources = fleet_of(2)
    with closing(fleet):
        sources[0].fails = True
        fleet.members["h1"].ask((), join=True)
        lost, live = fleet.hosts()
        assert (lost.state, live.state) == (HostState.LOST, HostState.LIVE)
        assert lost.guests == live.guests
        assert "it was cut" in lost.why
        assert fleet.snapshot().regions[0].name.startswith("h1/")
        assert fleet.members["h2"].row(-1).state is HostState.SILENT


# --- the command line ---


@pytest.mark.parametrize(
    ("ahead_s", "said"),
    [
        (4 * 365 * 86400, "its clock is 1460d00h ahead of this host's"),
        (-90, "its clock is 1m30s behind this host's"),
        (-30, ""),
    ],
)
def test_a_host_whose_clock_is_off_is_told_and_its_age_is_by_ones_own(ahead_s: int, said: str) -> None:
    source = SyntheticSource(snapshot())
    there = Member("h1", lambda: source, clock=lambda: NOW_NS - ahead_s * 1_000_000_000)
    there.ask((), join=True)
    row = there.row(3.0)
    assert row.state is HostState.LIVE
    assert row.reason.partition("; ")[2] == said
    assert row.age_ns is not None
    assert row.age_ns < LONG_S * 1_000_000_000


@pytest.fixture
def sources() -> list[ServedSource]:
    return [ServedSource(snapshot(4, 2)), ServedSource(snapshot(3, 3))]


@pytest.fixture
def words(sources: list[ServedSource], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Words that name two hosts that answer."""
    monkeypatch.setenv("PATH", f"{memconsole_in(tmp_path)}:{os.environ['PATH']}")
    body = f'[ -S {tmp_path}/$host ] || {{ echo "ssh: Could not resolve hostname $host" >&2; exit 255; }}\n'
    monkeypatch.setenv(
        "MEMCONSOLE_SSH", str(as_ssh(tmp_path, body + f"exec memconsole --socket {tmp_path}/$host bridge"))
    )
    with ExitStack() as stack:
        for number, source in enumerate(sources, 1):
            stack.enter_context(closing(serve_in_thread(source, tmp_path / f"h{number}")))
        yield ["--host", "h1", "--host", "h2"]


def test_hosts_lists_those_that_answer_those_that_do_not_and_files(
    words: list[str], sources: list[ServedSource], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recording.write(tmp_path / "old.snap", snapshot(5, 1), {})
    named = tmp_path / "hosts"
    named.write_text(f"h1  # the first\n\nh2\nnowhere\n{tmp_path}/old.snap\n")
    assert main(["--hosts", str(named), "hosts", "--json"]) == ExitCode.FAILED
    rows = {row["host"]: row for row in json.loads(capsys.readouterr().out)}
    assert {name: row["state"] for name, row in rows.items()} == {
        "h1": "live", "h2": "live", "nowhere": "lost", "old": "recorded",
    }  # fmt: skip
    assert [rows[name]["guests"] for name in ("h1", "h2", "old")] == [2, 3, 1]
    assert "Could not resolve" in rows["nowhere"]["why"]
    assert main([*words, "hosts", "--columns", "host,guests", "--sort", "guests", "--csv"]) == ExitCode.DONE
    assert capsys.readouterr().out.split() == ["host,guests", "h2,3", "h1,2"]


def test_a_listing_of_several_hosts_has_the_host_first(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*words, "guests", "--columns", "name", "--where", "host:h2", "--csv"]) == ExitCode.DONE
    lines = capsys.readouterr().out.split()
    assert lines[0] == "host,name"
    assert {line.partition(",")[0] for line in lines[1:]} == {"h2"}
    assert main([*words, "regions", "--json"]) == ExitCode.DONE
    rows = json.loads(capsys.readouterr().out)
    assert [row["host"] for row in rows] == ["h1"] * 4 + ["h2"] * 3
    assert main([*words, "--host", "nowhere", "guests"]) == ExitCode.FAILED
    said = capsys.readouterr()
    assert "nowhere is not listed" in said.err
    assert "h2" in said.out
    assert main([*words, "doctor"]) == ExitCode.USAGE


def test_an_action_on_several_hosts_is_planned_on_each_and_done_on_all_or_none(
    words: list[str], sources: list[ServedSource], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*words, "reserve", "new", "64M", "--dry-run", "--json"]) == ExitCode.DONE
    assert [each["host"] for each in json.loads(capsys.readouterr().out)] == ["h1", "h2"]
    assert main([*words, "reserve", "new", "64M"]) == ExitCode.USAGE, "stdin is no terminal: no number can be typed"
    assert "reserve on 2 hosts must be confirmed" in capsys.readouterr().err
    assert main([*words, "--host", "nowhere", "reserve", "new", "64M", "--yes"]) == ExitCode.FAILED
    assert [len(each.applied) for each in sources] == [0, 0]
    assert main([*words, "reserve", "new", "64M", "--yes"]) == ExitCode.DONE
    assert [len(each.applied) for each in sources] == [1, 1]


def test_the_console_of_one_of_many_hosts_has_the_commands_of_a_shell_on_that_host(
    words: list[str], sources: list[ServedSource], monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []

    def opened(found: Source, *, command_line: Inside, command: Callable[[list[str]], Ran], **_: object) -> int:
        said.append(command_line.run(["guests", "--columns", "name", "--csv"], found).text)
        said.append(command(["guests", "--columns", "name", "--csv"]).text)
        return 0

    def many(fleet: Fleet, open_one: Callable[[str, Place], int], **_: object) -> int:
        fleet.wait(LONG_S)
        return open_one("h2", Place("overview"))

    monkeypatch.setattr(hosting, "_on_a_terminal", lambda: None)
    monkeypatch.setattr(opening, "run", opened)
    monkeypatch.setattr(opening, "run_many", many)
    assert main(words) == ExitCode.DONE
    names = ["name", *(guest.name for guest in sources[1].snapshot().guests)]
    assert [text.split() for text in said] == [names, names]


@pytest.mark.parametrize(("share", "pauses"), [(0.0, [8.0, 8.0]), (0.25, [10.0, 8.0]), (0.75, [14.0, 8.0])])
def test_hosts_are_asked_at_once_and_then_one_after_the_other(
    share: float, pauses: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[float] = []

    class Over(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            found.append(timeout or 0.0)
            if len(found) == len(pauses):
                self.set()
            return self.is_set()

    asked = Member("h", lambda: SyntheticSource(snapshot()))
    fleet = Fleet([asked], interval=8.0)
    monkeypatch.setattr(fleet, "_over", Over())
    fleet._follow(asked, share, once=False)
    assert found == pauses
