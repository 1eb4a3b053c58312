"""How long work waited, as the kernel counts it, and the trends that two Snapshots and more make of it."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace
from support.synthetic import MIB, snapshot, with_usage
from support.trees import Tree

from memconsole import rates
from memconsole.backend.kernel import waits
from memconsole.errors import BadFile
from memconsole.fields import TABLES
from memconsole.model import Faults, Snapshot, Stalls, Trends

SECOND = 1_000_000_000
PRESSURE = "some avg10=1.00 avg60=0.50 avg300=0.10 total={}\nfull avg10=0.00 avg60=0.00 avg300=0.00 total=7\n"


def pressured(root: Path) -> Tree:
    tree = Tree(root)
    for resource, total in (("cpu", 11), ("memory", 22), ("io", 33)):
        tree.write(f"/proc/pressure/{resource}", PRESSURE.format(total))
    return tree


def test_stalls_are_those_of_some_task(tmp_path: Path) -> None:
    pressured(tmp_path)
    assert waits.stalls(tmp_path) == Stalls(11_000, 22_000, 33_000)


def test_a_kernel_without_pressure_says_nothing_rather_than_none_at_all(tmp_path: Path) -> None:
    assert waits.stalls(tmp_path) is None
    assert waits.waited(tmp_path, 7, [7]) is None


@pytest.mark.parametrize("text", ["", "some avg10=0.00\n", "some total=x\n", "full avg10=0.00 total=3\n"])
def test_a_malformed_pressure_is_named(tmp_path: Path, text: str) -> None:
    pressured(tmp_path).write("/proc/pressure/io", text)
    with pytest.raises(BadFile, match="/proc/pressure/io"):
        waits.stalls(tmp_path)


def test_the_waits_of_threads_are_added_and_those_that_ended_left_out(tmp_path: Path) -> None:
    tree = Tree(tmp_path)
    tree.write("/proc/7/task/8/schedstat", "100 20 3\n")
    tree.write("/proc/7/task/9/schedstat", "100 5 3\n")
    assert waits.waited(tmp_path, 7, [8, 9, 10]) == 25
    tree.write("/proc/7/task/9/schedstat", "100\n")
    with pytest.raises(BadFile, match="schedstat"):
        waits.waited(tmp_path, 7, [8, 9])


def test_this_process_has_page_faults_as_getrusage_counts_them() -> None:
    import resource

    before = resource.getrusage(resource.RUSAGE_SELF)
    found = waits.page_faults("/", os.getpid())
    after = resource.getrusage(resource.RUSAGE_SELF)
    assert before.ru_minflt + before.ru_majflt <= found <= after.ru_minflt + after.ru_majflt


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=120))
def test_whatever_the_files_hold_a_reader_answers_or_names_what_is_wrong(tmp_path: Path, raw: bytes) -> None:
    for path in ("proc/pressure/cpu", "proc/7/task/7/schedstat", "proc/7/stat"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(raw)
    for read in (
        lambda: waits.stalls(tmp_path),
        lambda: waits.waited(tmp_path, 7, [7]),
        lambda: waits.page_faults(tmp_path, 7),
    ):
        with suppress(BadFile):
            read()


# --- trends ---------------------------------------------------------------------------------------------------------


def at(seconds: int, **changes: Any) -> Snapshot:
    """The host so many seconds later: it stalls for a CPU half of the time, its guests wait a quarter and fault."""
    made = with_usage(snapshot(4, 3), seconds)
    assert made.usage is not None
    ns = seconds * SECOND

    def guest(each: Any) -> Any:
        used = replace(each.seen.usage, faults=100 * seconds, waited_ns=ns // 4)
        return replace(each, seen=replace(each.seen, usage=used))

    usage = replace(made.usage, stalls=Stalls(ns // 2, 0, ns // 10))
    return replace(made, usage=usage, guests=tuple(guest(each) for each in made.guests), **changes)


def followed(*seconds: int) -> Snapshot:
    shown = at(seconds[0])
    for second in seconds[1:]:
        shown = rates.rated(shown, at(second))
    return shown


def host_trends(shown: Snapshot) -> Trends:
    assert shown.usage is not None
    assert shown.usage.rates is not None
    return shown.usage.rates.trends


def test_the_hosts_trends_are_of_what_it_uses_and_where_it_waits() -> None:
    found = host_trends(followed(0, 1, 2))
    memory = snapshot().memory
    assert list(found.cpu) == [0.5, 0.5]
    assert list(found.memory_wait) == [0.0, 0.0]
    assert list(found.io) == [0.1, 0.1]
    assert list(found.memory) == [memory.total - memory.available] * 2
    assert list(found.guests) == [0.75, 0.75]
    lazy = [grant.faults for grant in snapshot(4, 3).grants if grant.faults is not None]
    assert list(found.touched) == [sum(each.present for each in lazy)] * 2
    assert list(found.faults) == [sum(each.rate for each in lazy)] * 2


def test_a_guest_has_trends_of_its_own_and_columns_of_them() -> None:
    shown = followed(0, 1, 2)
    lazy = next(grant for grant in shown.grants if grant.faults is not None)
    for guest in shown.guests:
        assert guest.seen is not None
        used = rates.usage_of(guest)
        assert used is not None
        assert used.rates is not None
        assert [used.rates.faults, used.rates.waited] == [100.0, 0.25]
        trends = used.rates.trends
        assert [list(trends.faults), list(trends.cpu)] == [[100.0, 100.0], [0.25, 0.25]]
        assert list(trends.memory) == [guest.seen.rss] * 2
        assert bool(trends.touched) == (guest.name == lazy.guest)
    columns = {field.id: field for field in TABLES["guests"].fields}
    assert [columns[id].text(shown.guests[0]) for id in ("stall", "page_faults")] == ["25.0", "100"]


def test_lazy_grants_of_a_guest_count_together() -> None:
    made = snapshot(4, 1)
    lazy = tuple(replace(grant, faults=Faults(True, present=MIB, rate=3)) for grant in made.grants)
    found = rates.lazy_of(replace(made, grants=lazy))
    (one,) = found.values()
    assert (one.present, one.rate) == (len(lazy) * MIB, 3 * len(lazy))


def test_a_host_with_very_many_guests_has_its_own_trends_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rates, "MOST_TRENDED", 2)
    shown = followed(0, 1)
    assert host_trends(shown).guests == (0.75,)
    used = rates.usage_of(shown.guests[0])
    assert used is not None
    assert used.rates is not None
    assert used.rates.trend == (0.0,)
    assert used.rates.trends == Trends()


def test_memory_by_the_size_of_its_pages_is_a_column() -> None:
    pages = next(field for field in TABLES["guests"].fields if field.id == "pages")
    guest = snapshot(4, 3).guests[0]
    assert guest.seen is not None
    mapped, huge = guest.seen.mapped, guest.seen.huge
    assert mapped is not None
    assert huge is not None
    assert pages.get(guest) == (huge, mapped - huge)
    assert pages.text(replace(guest, seen=None)) == "-"
