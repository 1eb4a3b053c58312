"""Custody: three holders, one behaviour; and what each does when the process that put something there is gone."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support import keepers
from support.custodies import fd_store_works, file_with, get, put
from support.notify import Manager
from support.open_fds import nothing_stays_open
from support.waiting import until

from memconsole import native
from memconsole.backend.custody.holder import Custody, KeeperCustody, OwnCustody
from memconsole.backend.custody.respawn import RespawningKeeper
from memconsole.backend.custody.systemd import SystemdCustody
from memconsole.errors import Gone, MemconsoleError, NotFound, Refused, Silent, UsageError


@pytest.fixture
def keeper() -> Iterator[keepers.Running]:
    with keepers.running(native.program("memconsole-keeper")) as run:
        yield run


@contextlib.contextmanager
def own(_: Path) -> Iterator[Custody]:
    custody = OwnCustody()
    yield custody
    custody.close()


@contextlib.contextmanager
def kept(_: Path) -> Iterator[Custody]:
    with keepers.running(native.program("memconsole-keeper")) as run:
        custody = KeeperCustody(run.path)
        yield custody
        custody.close()


@contextlib.contextmanager
def refilled(_: Path) -> Iterator[Custody]:
    with keepers.running(native.program("memconsole-keeper")) as run:
        custody = RespawningKeeper(run.path.parent)
        yield custody
        custody.close()


@contextlib.contextmanager
def stored(directory: Path) -> Iterator[Custody]:
    if not fd_store_works():
        pytest.skip("this kernel has no F_DUPFD_QUERY (Linux 6.10)")
    manager = Manager(directory)
    custody = SystemdCustody([], manager.environ)
    yield custody
    custody.close()
    manager.close()


@pytest.fixture(params=[own, kept, refilled, stored], ids=["own", "keeper", "refilled", "systemd"])
def custody(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Custody]:
    make: Callable[[Path], contextlib.AbstractContextManager[Custody]] = request.param
    with make(tmp_path) as made:
        yield made


def test_what_is_put_is_got_back(custody: Custody) -> None:
    put(custody, "region:web:0", b"contents", b"payload\0\xff")
    put(custody, "ledger", b"log")
    assert get(custody, "region:web:0") == (b"contents", b"payload\0\xff")
    assert get(custody, "ledger") == (b"log", b"")
    assert custody.names() == ["ledger", "region:web:0"]
    assert custody.label


def test_put_replaces_and_drop_forgets(custody: Custody) -> None:
    put(custody, "a", b"first", b"1")
    put(custody, "a", b"second", b"2")
    assert get(custody, "a") == (b"second", b"2")
    custody.drop("a")
    assert custody.names() == []
    with pytest.raises(NotFound, match="'a'"):
        custody.get("a")
    with pytest.raises(NotFound, match="'a'"):
        custody.drop("a")


def test_a_payload_can_change_and_a_file_can_have_two_names(custody: Custody) -> None:
    fd = file_with(b"one file")
    custody.put("a", fd, b"1")
    custody.put("b", fd, b"2")
    custody.put("a", fd, b"3")
    assert (get(custody, "a"), get(custody, "b")) == ((b"one file", b"3"), (b"one file", b"2"))
    custody.drop("a")
    assert get(custody, "b") == (b"one file", b"2")
    os.close(fd)


@pytest.mark.parametrize("name", ["", "x" * 201, "a\0b"])
def test_names_that_cannot_be_are_refused(custody: Custody, name: str) -> None:
    fd = file_with(b"")
    with pytest.raises(UsageError):
        custody.put(name, fd)
    os.close(fd)
    with pytest.raises(UsageError):
        custody.put("a", 0, b"x" * 4097)
    assert custody.names() == []


def test_a_bad_fd_is_the_callers_error(custody: Custody) -> None:
    fd = file_with(b"")
    os.close(fd)
    with pytest.raises(OSError, match="Bad file descriptor"):
        custody.put("a", fd)
    put(custody, "a", b"still works")
    assert get(custody, "a") == (b"still works", b"")


def test_names_of_any_script_are_sorted(custody: Custody) -> None:
    for name in ("Ω", "a:b", "%41", "á", "x" * 200):
        put(custody, name, name.encode())
    assert custody.names() == sorted(["Ω", "a:b", "%41", "á", "x" * 200])
    assert get(custody, "Ω") == ("Ω".encode(), b"")


def test_ten_thousand_puts_and_gets_leak_nothing(keeper: keepers.Running) -> None:
    custody = KeeperCustody(keeper.path)
    fd = file_with(b"contents")
    custody.put("a", fd)
    before = keeper.open_files(), custody.status()
    with nothing_stays_open():
        for n in range(10_000):
            name = f"{n % 7}"
            custody.put(name, fd, b"payload")
            os.close(custody.get(name)[0])
            custody.drop(name)
    assert (keeper.open_files(), custody.status()) == before
    os.close(fd)
    custody.close()


def test_threads_share_one_connection(keeper: keepers.Running) -> None:
    custody = KeeperCustody(keeper.path)
    wrong: list[str] = []

    def work(me: int) -> None:
        for n in range(200):
            put(custody, f"{me}", f"{me}-{n}".encode(), b"%d" % n)
            if get(custody, f"{me}") != (f"{me}-{n}".encode(), b"%d" % n):
                wrong.append(f"{me}-{n}")

    threads = [threading.Thread(target=work, args=(me,)) for me in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert custody.names() == ["0", "1", "2", "3"]
    custody.close()


CHILD = """
import os, sys, time
from pathlib import Path
from memconsole.backend.custody.holder import KeeperCustody
custody = KeeperCustody(Path(sys.argv[1]))
n = 0
while True:
    fd = os.memfd_create("region", os.MFD_CLOEXEC)
    os.write(fd, b"%d" % n)
    custody.put(f"{n}", fd, b"payload %d" % n)
    os.close(fd)
    print(n, flush=True)
    n += 1
"""


def test_a_client_killed_at_any_moment_loses_nothing_it_was_told_is_kept(keeper: keepers.Running) -> None:
    custody = KeeperCustody(keeper.path)
    child = subprocess.Popen([sys.executable, "-c", CHILD, str(keeper.path)], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    for _ in range(50):
        child.stdout.readline()
    child.kill()
    rest, _ = child.communicate()
    told = 49 + len([line for line in rest.splitlines() if line])
    names = custody.names()
    assert len(names) in {told + 1, told + 2}
    for n in range(len(names)):
        assert get(custody, f"{n}") == (b"%d" % n, b"payload %d" % n)
    assert custody.status().clients == 1
    custody.close()


def test_started_it_outlives_its_starter_and_is_found_again(tmp_path: Path) -> None:
    starter = (
        "import sys, os; from pathlib import Path; from memconsole.backend.custody.holder import KeeperCustody\n"
        "custody = KeeperCustody.start(Path(sys.argv[1])); custody.put('a', os.memfd_create('x'), b'kept')\n"
        "print(custody.pid, flush=True); os.kill(os.getpid(), 9)"
    )
    ran = subprocess.run([sys.executable, "-c", starter, tmp_path], stdout=subprocess.PIPE, check=False)
    assert ran.returncode == -signal.SIGKILL
    custody = KeeperCustody.start(tmp_path)
    try:
        assert custody.pid == int(ran.stdout)
        assert get(custody, "a") == (b"", b"kept")
        assert Path(f"/proc/{custody.pid}/comm").read_text() == "mc-keeper\n"
        exempt = Path(f"/proc/{custody.pid}/oom_score_adj").read_text() == "-1000\n"
        locked = "VmLck:\t       0 kB" not in Path(f"/proc/{custody.pid}/status").read_text()
        missing = custody.status().unguarded()
        assert ("it is not exempt from the OOM killer" not in missing) == exempt
        assert ("it is not locked in memory" not in missing) == locked
        with pytest.raises(Refused) as caught:
            custody.end()
        assert caught.value.code == "CustodyHolding"
        assert custody.names() == ["a"]
    finally:
        custody.end(holding=True)
        custody.close()
    until(lambda: not (tmp_path / "keeper").exists(), "the keeper, which answers before it ends, has ended")


def test_started_by_many_at_once_there_is_one(tmp_path: Path) -> None:
    found: list[KeeperCustody] = []
    threads = [threading.Thread(target=lambda: found.append(KeeperCustody.start(tmp_path))) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    try:
        assert len(found) == 6
        assert len({custody.pid for custody in found}) == 1
    finally:
        found[0].end(holding=True)
        for custody in found:
            custody.close()


def test_a_runtime_directory_that_is_missing_is_said(tmp_path: Path) -> None:
    with pytest.raises(MemconsoleError, match="No such file"):
        KeeperCustody.start(tmp_path / "missing")


def test_a_keeper_that_ended_is_said_and_another_in_its_place_is_not_taken_for_it(tmp_path: Path) -> None:
    first = KeeperCustody.start(tmp_path)
    put(first, "a", b"")
    os.kill(first.pid, signal.SIGKILL)
    with pytest.raises(Gone) as caught:
        get(first, "a")
    assert caught.value.code == "CustodyGone"
    with pytest.raises(Gone, match="no keeper answers"):
        first.names()
    second = KeeperCustody.start(tmp_path)
    try:
        assert second.names() == []
        with pytest.raises(Gone, match="does not hold its memory"):
            first.names()
    finally:
        second.end()
        second.close()
        first.close()


def test_a_keeper_that_ended_is_replaced_with_copies_and_what_nobody_else_had_is_named(keeper: keepers.Running) -> None:
    with contextlib.closing(KeeperCustody(keeper.path)) as before:
        put(before, "was there", b"contents", b"payload")
        with contextlib.closing(RespawningKeeper(keeper.path.parent)) as custody:
            put(custody, "mine", b"mine")
            put(before, "somebody's", b"gone")
            assert custody.names() == ["mine", "somebody's", "was there"]
            keeper.process.kill()
            keeper.process.wait()
            assert custody.names() == ["mine", "was there"]
            fd, payload = custody.get("was there")
            assert (os.pread(fd, 99, 0), payload) == (b"contents", b"payload")
            os.close(fd)
            (said,) = custody.troubles()
            assert f"pid {keeper.process.pid}, ended" in said
            assert said.endswith("holds 2 descriptors again, and somebody's are lost")
            custody.check()
            assert len(custody.troubles()) == 1
            with contextlib.closing(KeeperCustody(keeper.path)) as last:
                last.end(holding=True)


def test_a_connection_that_broke_is_made_anew(keeper: keepers.Running) -> None:
    custody = KeeperCustody(keeper.path)
    put(custody, "a", b"x")
    assert custody._socket is not None
    custody._socket.shutdown(socket.SHUT_RDWR)
    with pytest.raises(Gone):
        custody.names()
    assert get(custody, "a") == (b"x", b"")
    custody.close()
    with pytest.raises(Gone, match="closed its connection"):
        custody.names()


def test_a_stopped_keeper_is_silent_and_answers_again_once_it_goes_on(keeper: keepers.Running) -> None:
    with contextlib.closing(KeeperCustody(keeper.path, timeout=0.2)) as custody:
        put(custody, "a", b"x")
        os.kill(custody.pid, signal.SIGSTOP)
        try:
            for _ in range(3):  # the connection is made anew, and greeted no more than it was answered
                with pytest.raises(Silent, match=f"pid {custody.pid} does not answer") as silent:
                    custody.check()
                assert silent.value.code == "CustodySilent"
        finally:
            os.kill(custody.pid, signal.SIGCONT)
        until(lambda: answers(custody), "the keeper answers again")
        assert get(custody, "a") == (b"x", b"")


def test_a_stopped_keeper_is_not_replaced_by_one_that_holds_nothing(tmp_path: Path) -> None:
    with contextlib.closing(RespawningKeeper(tmp_path)) as custody:
        pid = custody.pid
        put(custody, "a", b"x")
        custody._keeper._timeout = 0.2
        os.kill(pid, signal.SIGSTOP)
        try:
            with pytest.raises(Silent):
                custody.names()
            with pytest.raises(Silent):
                KeeperCustody.start(tmp_path, timeout=0.2)
        finally:
            os.kill(pid, signal.SIGCONT)
        custody._keeper._timeout = 10.0
        until(lambda: answers(custody), "the keeper answers again")
        assert custody.names() == ["a"]
        assert (custody.pid, custody.troubles()) == (pid, [])
        with contextlib.closing(KeeperCustody(tmp_path / "keeper")) as last:
            last.end(holding=True)


def answers(custody: KeeperCustody | RespawningKeeper) -> bool:
    with contextlib.suppress(Silent):
        custody.check()
        return True
    return False


@pytest.mark.parametrize("reachable", [False, True], ids=["by the socket's mode", "by its credentials"])
def test_another_user_is_denied_by_name(keeper: keepers.Running, reachable: bool) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can become another user")
    if reachable:
        keeper.path.parent.chmod(0o755)
        keeper.path.chmod(0o666)

    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
            try:
                KeeperCustody(keeper.path)
                verdict = "let in"
            except MemconsoleError as error:
                verdict = f"{type(error).__name__} {error}"
            os.write(write_end, verdict.encode())
        finally:
            os._exit(0)
    os.close(write_end)
    with os.fdopen(read_end) as pipe:
        verdict = pipe.read()
    os.waitpid(pid, 0)
    assert verdict.startswith("Denied ")
    assert "root" in verdict
    custody = KeeperCustody(keeper.path)
    assert custody.status().clients == 1
    custody.close()
