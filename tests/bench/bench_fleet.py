"""Many hosts in one console, one from afar, and a roll: what a key over 200 hosts costs, what ssh adds to a Snapshot.

The hosts are synthetic Sources in the console's process, each of which a thread asks every second as it asks real ones;
of two Snapshots each shows the other, which is part of the processor time of a key. A Snapshot from afar comes through
``ssh`` to this machine and ``memconsole bridge``. A roll is Ansible's, playbook, role and actions and all, over hosts
in the place of whose Python is a stub that says it is one (stub_python.sh) and takes its seconds for a handoff:
MEMCONSOLE_BENCH_HOSTS (up to 1,000), a tenth of them a batch, and MEMCONSOLE_BENCH_HANDOFF_S.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

from bench_console import Press, Terminal, _p99, _pressed
from harness import Result, Skip

HERE = Path(__file__).parent
HOSTS, GUESTS = 200, 100
"""Hosts, and guests on each of them."""
KEYS = (
    ["down"] * 40 + ["pgdn"] * 5 + ["up"] * 10 + ["end", "home"] * 3 + [">", "i"] * 3
    + ["/", *"h17", "ctrl+u", "enter"] * 2
    + ["3"] + ["down"] * 40 + ["pgdn"] * 10 + ["end", "home"] * 3 + ["1", "3"] * 5
)  # fmt: skip
TIMES = 20


def _console() -> None:
    sys.path.insert(0, str(HERE.parent))
    from msgspec.structs import replace
    from support.alternating import AlternatingSource
    from support.synthetic import NOW_NS, snapshot

    from memconsole.fleet import Fleet, Member
    from memconsole.views.fleetapp import FleetApp

    def member(number: int) -> Member:
        now = snapshot(10, GUESTS)
        source = AlternatingSource(now)
        first = replace(now.guests[0], memory=now.guests[0].memory + 4096)
        source.other = replace(now, guests=(first, *now.guests[1:]))
        return Member(f"h{number}", lambda: source, clock=lambda: NOW_NS)

    fleet = Fleet([member(number) for number in range(HOSTS)], interval=1.0)
    fleet.start()
    fleet.wait(60.0)
    with contextlib.closing(fleet):
        FleetApp(fleet, interval=1.0, clock=lambda: NOW_NS).run()


def bench_hosts() -> list[Result]:
    """From a key to a painted frame over all hosts and all their guests, and resident memory."""
    with contextlib.closing(Terminal("console", command=(sys.executable, __file__))) as opened:
        if not opened.frames(1.0, 60.0):
            raise RuntimeError("the console painted nothing in 60 s")
        presses: list[Press] = _pressed(opened, KEYS)
        resident = opened.most_resident()
    name = f"{HOSTS} hosts, {HOSTS * GUESTS:,} guests"
    return [
        Result(f"key to frame, {name}, median", statistics.median(press.first for press in presses), "ms", goal=16.0),
        Result(f"key to frame, {name}, processor time, p99", _p99([press.used for press in presses]), "ms", goal=33.0),
        Result(f"console of {name}, most resident", resident, "MiB", goal=250.0),
    ]


def bench_snapshot_from_afar() -> list[Result]:
    """A Snapshot of 1,000 guests that changed, over ssh to this machine, against the control socket."""
    sys.path.insert(0, str(HERE.parent))
    from support.remotes import SSHD, memconsole_in, ssh_host
    from support.served import ServedSource
    from support.synthetic import snapshot

    from memconsole.backend.wire.client import Client
    from memconsole.backend.wire.remote import Remote
    from memconsole.backend.wire.serving import serve_in_thread

    if not SSHD or shutil.which("ssh") is None:
        raise Skip("there is no sshd or no ssh here")

    def took(client: Client) -> float:
        client.snapshot()
        times = []
        for _ in range(TIMES):
            time.sleep(0.3)  # until what was asked before is not handed out again
            source.show(snapshot(100, 1000))
            begin = time.perf_counter()
            client.snapshot()
            times.append((time.perf_counter() - begin) * 1000)
        return statistics.median(times)

    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        directory = Path(name)
        host = stack.enter_context(ssh_host(directory, f"{memconsole_in(directory)}:{os.environ['PATH']}"))
        source = ServedSource(snapshot(100, 1000))
        stack.enter_context(contextlib.closing(serve_in_thread(source, directory / "control")))
        os.environ["MEMCONSOLE_SSH"] = host.ssh
        stack.callback(os.environ.pop, "MEMCONSOLE_SSH")
        near = took(stack.enter_context(contextlib.closing(Client(directory / "control"))))
        place = Remote(host.name, str(directory / "control"))
        far = took(stack.enter_context(contextlib.closing(Client(place))))
    return [Result("snapshot of 1,000 guests over ssh, against the control socket", far, "ms", near, goal=2.0)]


def bench_roll() -> list[Result]:
    """A roll of N hosts in batches of k, the canary before them and the gate included, in handoffs, against N / k."""
    sys.path.insert(0, str(HERE.parent))
    from support.playbooks import Engine

    hosts, handoff_s = (
        int(os.environ.get(f"MEMCONSOLE_BENCH_{name}", default)) for name, default in (("HOSTS", 20), ("HANDOFF_S", 20))
    )
    batch = max(1, hosts // 10)
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        shared = {
            "ansible_connection": "local",
            "ansible_python_interpreter": str(HERE / "stub_python.sh"),
            "memconsole_interval": 1,
        }
        sockets = {f"h{number}": {"memconsole_socket": str(directory / f"h{number}")} for number in range(hosts)}
        engine = Engine(directory, sockets, shared)
        os.environ["STUB_HANDOFF_S"] = str(handoff_s)
        begin = time.perf_counter()
        done = engine.play("roll", "-e", f"memconsole_serial={batch}")
        took = time.perf_counter() - begin
        if done.returncode or set(engine.states()) != {"done"}:
            raise RuntimeError(f"the roll ended with {done.returncode}: {done.stdout[-2000:]}")
    what = f"roll of {hosts:,} hosts in batches of {batch}, handoffs of {handoff_s} s"
    return [Result(what, took / handoff_s, "", hosts / batch, goal=1.2)]


if __name__ == "__main__":
    _console()
