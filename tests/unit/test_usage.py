"""What is used: counters of processes that are there, rates from two Snapshots, and nothing made up."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest
from msgspec.structs import replace
from support.served import ServedSource
from support.synthetic import PAGE, snapshot
from support.trees import Tree

from memconsole import rates
from memconsole.backend.kernel import census, numa
from memconsole.backend.observe import usage
from memconsole.backend.wire import metrics
from memconsole.backend.wire.client import Client
from memconsole.backend.wire.serving import serve_in_thread
from memconsole.errors import BadFile, UsageError
from memconsole.model import HostUsage, Node, NodeBytes, Part, ProcessId, Rates, Snapshot, ThreadUsage, Usage, Vcpu

SECOND = 1_000_000_000
NODES = (Node(0, 1 << 30, 0, "0-3,8"), Node(1, 1 << 30, 0, "4-7"))


@pytest.fixture
def child() -> Iterator[subprocess.Popen[bytes]]:
    """A process that waits."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as made:
        yield made
        made.kill()


def started(pid: int) -> int:
    return census.process("/", pid).start_ticks


# --- reading --------------------------------------------------------------------------------------------------------


def test_a_process_is_read_as_the_kernel_has_it(child: subprocess.Popen[bytes]) -> None:
    os.sched_setaffinity(child.pid, {0})
    found = usage.usage_of(ProcessId(child.pid, started(child.pid)), NODES)
    assert found is not None
    assert (found.pid, found.start_ticks, found.threads) == (child.pid, started(child.pid), 1)
    assert (found.cpus, found.nodes) == ("0", (0,))
    assert found.cpu_ns is not None
    assert found.age_ns is not None
    assert 0 <= found.age_ns < 3600 * SECOND
    assert found.unknown == ""


def test_threads_are_read_by_their_ids() -> None:
    known: list[int] = []
    ready, go = threading.Event(), threading.Event()

    def work() -> None:
        known.append(threading.get_native_id())
        os.sched_setaffinity(0, {0})
        ready.set()
        go.wait()

    thread = threading.Thread(target=work)
    thread.start()
    try:
        assert ready.wait(60)
        vcpus = (Vcpu(0, known[0]), Vcpu(1, None), Vcpu(2, 1 << 22))
        found = usage.usage_of(ProcessId(os.getpid(), started(os.getpid())), NODES, vcpus)
    finally:
        go.set()
        thread.join()
    assert found is not None
    mine, gone = found.vcpus
    assert (mine.index, mine.tid, mine.cpus, mine.nodes) == (0, known[0], "0", (0,))
    assert mine.cpu_ns is not None
    assert mine.name
    assert gone == ThreadUsage(2, 1 << 22), "a thread that is not there is unknown, not idle"


def test_a_process_that_ended_and_a_pid_used_again_are_not_known(child: subprocess.Popen[bytes]) -> None:
    began = started(child.pid)
    assert usage.usage_of(ProcessId(child.pid, began - 1), NODES) is None, "its PID was another's then"
    child.kill()
    child.wait()
    assert usage.usage_of(ProcessId(child.pid, began), NODES) is None


@pytest.mark.parametrize(
    ("error", "why"),
    [
        (psutil.AccessDenied(1), "not shown to this user"),
        (psutil.NoSuchProcess(1), "ended"),
        (OSError(5, "Input/output error"), "Input/output error"),
        (ValueError("no field"), "no field"),
    ],
)
def test_what_cannot_be_read_is_unknown_and_the_rest_is_read(
    error: Exception, why: str, child: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(_: psutil.Process) -> Any:
        raise error

    monkeypatch.setattr(psutil.Process, "io_counters", fails)
    found = usage.usage_of(ProcessId(child.pid, started(child.pid)), NODES)
    assert found is not None
    assert (found.read, found.written) == (None, None)
    assert found.threads == 1
    assert found.unknown.startswith("I/O: ")
    assert why in found.unknown


def test_a_kernel_that_counts_no_io_is_said(child: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(psutil.Process, "io_counters")
    found = usage.usage_of(ProcessId(child.pid, started(child.pid)), NODES)
    assert found is not None
    assert found.read is None
    assert found.unknown == "I/O: this kernel does not count it"


def test_the_host_and_this_process_are_read() -> None:
    found = usage.host_usage(NODES)
    assert found.user_ns > 0
    assert found.idle_ns >= 0
    assert len(found.load) == 3
    assert found.service is not None
    assert found.service.pid == os.getpid()
    assert found.service_rss is not None
    assert found.service_rss > PAGE


def test_of_a_recorded_tree_usage_is_a_gap_not_this_hosts(tmp_path: Path) -> None:
    shown = usage.with_usage(snapshot(1, 1), tmp_path)
    assert shown.usage is None
    assert shown.gaps[-1].source == "usage"


def test_placement_counts_pages_of_their_own_size(tmp_path: Path) -> None:
    # Linux 7.1 fs/proc/task_mmu.c: show_numa_map
    Tree(tmp_path).write(
        "/proc/7/numa_maps",
        "00400000 default file=/usr/bin/a\\040N0=9 mapped=3 N0=2 N1=1 kernelpagesize_kB=4\n"
        "7f0000000000 default file=/dev/hugepages/x huge dirty=2 N1=2 kernelpagesize_kB=2048\n"
        "7f1000000000 bind:0 stack\n",
    )
    assert numa.placement(tmp_path, 7) == (NodeBytes(0, 2 * PAGE), NodeBytes(1, PAGE + (4 << 20)))


def test_placement_is_not_guessed(tmp_path: Path) -> None:
    Tree(tmp_path).write("/proc/7/numa_maps", "00400000 default anon=1 N0=x kernelpagesize_kB=4\n")
    with pytest.raises(BadFile):
        numa.placement(tmp_path, 7)


def test_the_node_of_cpus() -> None:
    assert numa.nodes_of({0, 8}, NODES) == (0,)
    assert numa.nodes_of({3, 4}, NODES) == (0, 1)
    assert numa.nodes_of({3}, ()) is None
    assert numa.cpu_list({8, 0, 1, 2, 5}) == "0-2,5,8"
    assert numa.cpu_list(()) == ""


# --- rates ----------------------------------------------------------------------------------------------------------


def used(at_s: float, cpu_s: float | None, read: int | None = 0, **changes: Any) -> Usage:
    ns = None if cpu_s is None else round(cpu_s * SECOND)
    made = Usage(4000, 7, round(at_s * SECOND), user_ns=ns, system_ns=0, read=read, written=None)
    return replace(made, **changes)


def host(of_guest: Usage | None, *, at_s: float = 0, busy_s: float = 0, **changes: Any) -> Snapshot:
    plain = snapshot(1, 1)
    guest = plain.guests[0]
    assert guest.seen is not None
    guest = replace(guest, pid=4000, start_ticks=7, seen=replace(guest.seen, usage=of_guest))
    mine = used(at_s, busy_s / 2, pid=1, start_ticks=1)
    whole = HostUsage(round(at_s * SECOND), round(busy_s * SECOND), 0, 0, service=mine)
    return replace(plain, guests=(guest,), usage=whole, **changes)


def rates_of(shown: Snapshot) -> Rates | None:
    found = rates.usage_of(shown.guests[0])
    return found.rates if found is not None else None


def test_a_rate_is_what_a_counter_grew_by() -> None:
    before = host(used(10, 5, read=1000), at_s=10, busy_s=20)
    found = rates.rated(before, host(used(12, 8, read=5000), at_s=12, busy_s=23))
    mine = rates_of(found)
    assert mine is not None
    assert (mine.over_ns, mine.busy, mine.read, mine.written) == (2 * SECOND, 1.5, 2000.0, None)
    assert mine.trend == (1.5,)
    assert found.usage is not None
    assert found.usage.rates is not None
    assert found.usage.rates.busy == 1.5
    assert found.usage.service is not None
    assert found.usage.service.rates is not None
    assert found.usage.service.rates.busy == 0.75
    assert rates.why_not(found.guests[0]) == ""


def test_a_trend_goes_on_from_snapshot_to_snapshot_and_is_bounded() -> None:
    shown = host(used(0, 0))
    for second in range(1, rates.TREND + 10):
        shown = rates.rated(shown, host(used(second, second / 2)))
    mine = rates_of(shown)
    assert mine is not None
    assert mine.trend == (0.5,) * rates.TREND


def test_the_same_answer_again_has_the_rates_it_had() -> None:
    second = rates.rated(host(used(0, 0)), host(used(1, 1), at_s=1))
    again = rates.rated(second, host(used(1, 1), at_s=1))
    assert rates_of(again) == rates_of(second) != None  # noqa: E711


@pytest.mark.parametrize(
    ("before", "now"),
    [
        (None, host(used(1, 1))),
        (replace(host(used(0, 0)), usage=None), host(used(1, 1))),
        (host(None), host(used(1, 1))),
        (host(used(0, 0, start_ticks=6)), host(used(1, 1))),
        (host(used(2, 0)), host(used(1, 1))),
    ],
    ids=["first", "not asked for", "not known before", "another process", "time went back"],
)
def test_without_two_answers_about_the_same_process_there_is_no_rate(before: Snapshot | None, now: Snapshot) -> None:
    shown = rates.rated(before, now)
    assert rates_of(shown) is None
    assert rates.why_not(shown.guests[0]) == "rates need a second Snapshot"


def test_another_guest_of_the_name_and_another_boot_are_not_compared() -> None:
    before, now = host(used(0, 0)), host(used(1, 1))
    (guest,) = now.guests
    assert guest.seen is not None
    other = replace(guest, start_ticks=9, seen=replace(guest.seen, usage=used(1, 1, start_ticks=9)))
    assert rates_of(rates.rated(before, replace(now, guests=(other,)))) is None
    later = replace(now, host=replace(now.host, boot_id="another"))
    assert rates.rated(before, later) is later


@pytest.mark.parametrize(("was", "now"), [(None, 1), (1, None), (5, 4)])
def test_a_counter_that_is_unknown_or_fell_has_no_rate(was: float | None, now: float | None) -> None:
    mine = rates_of(rates.rated(host(used(0, was)), host(used(1, now, unknown="CPU time: denied"))))
    assert mine is not None
    assert mine.busy is None
    assert mine.trend == ()


def test_why_something_is_not_known_is_said() -> None:
    (guest,) = host(used(0, 0, unknown="I/O: it is not shown to this user")).guests
    assert "I/O: it is not shown" in rates.why_not(guest)
    (guest,) = host(None).guests
    assert "was not asked for" in rates.why_not(guest)
    assert "no process" in rates.why_not(replace(guest, seen=None))


def test_a_vcpu_that_is_new_has_no_rate() -> None:
    vcpus = (ThreadUsage(0, 11, cpu_ns=0), ThreadUsage(1, 12, cpu_ns=None))
    later = (ThreadUsage(0, 11, cpu_ns=SECOND), ThreadUsage(1, 12, cpu_ns=5), ThreadUsage(2, 13, cpu_ns=9))
    shown = rates.rated(host(used(0, 0, vcpus=vcpus)), host(used(2, 0, vcpus=later)))
    found = rates.usage_of(shown.guests[0])
    assert found is not None
    assert [each.busy for each in found.vcpus] == [0.5, None, None]


# --- on the wire ----------------------------------------------------------------------------------------------------


def test_parts_are_asked_for_by_who_wants_them(tmp_path: Path) -> None:
    source = ServedSource(snapshot(2, 1))
    serving = serve_in_thread(source, tmp_path / "control")
    try:
        client = Client(tmp_path / "control")
        client.snapshot()
        client.snapshot((Part.USAGE,))
        client.snapshot()
        assert source.asked_for[:2] == [frozenset(), {Part.USAGE}], "what is fresh and lacks a part is no answer"
        assert next(iter(client.watch(parts=(Part.USAGE, Part.PLACEMENT)))) == source.snapshot()
        assert {Part.USAGE, Part.PLACEMENT} in source.asked_for
        client.close()
    finally:
        serving.close()


def test_a_service_that_knows_no_parts_gives_what_it_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = ServedSource(snapshot(2, 1))
    serving = serve_in_thread(source, tmp_path / "control")
    asked: list[Any] = []
    plain = Client._ask

    def older(self: Client, method: str, parameters: Any, kind: Any) -> Any:
        asked.append(parameters)
        if "parts" in parameters:
            raise UsageError("the control process does not take parts", "", code="InvalidParameter")
        return plain(self, method, parameters, kind)

    try:
        client = Client(tmp_path / "control")
        monkeypatch.setattr(Client, "_ask", older)
        assert client.snapshot((Part.USAGE,)) == client.snapshot((Part.USAGE,))
        assert ["parts" in each for each in asked] == [True, False, False], "it is not asked again and again"
        client.close()
    finally:
        serving.close()


def test_a_newer_snapshot_and_an_older_one_are_read() -> None:
    raw = msgspec.to_builtins(host(used(1, 1)))
    raw["usage"]["invented"] = raw["guests"][0]["seen"]["usage"]["invented"] = 7
    assert msgspec.convert(raw, Snapshot, strict=False) == host(used(1, 1))
    del raw["usage"]
    del raw["guests"][0]["seen"]["usage"]
    older = msgspec.convert(raw, Snapshot, strict=False)
    assert older.usage is None
    assert rates.usage_of(older.guests[0]) is None


def test_metrics_count_what_is_known_and_leave_out_the_rest() -> None:
    text = metrics.text(host(used(1, 1.25), at_s=1, busy_s=3))
    (guest,) = [
        line for line in text.splitlines() if line.startswith("memconsole_guest_cpu_seconds_total") and "user" in line
    ]
    assert guest.endswith(" 1.25")
    assert "memconsole_guest_storage_written" not in text
    assert "memconsole_service_cpu_seconds_total" in text
    assert "memconsole_guest_cpu" not in metrics.text(snapshot(1, 1)), "nothing was asked for"
