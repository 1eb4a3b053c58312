"""Another host's control process: what is seen and done is as it is here, and every way to fail has its name."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from support.open_fds import nothing_stays_open
from support.remotes import as_ssh, memconsole_in
from support.served import Raw, ServedSource
from support.synthetic import snapshot
from support.waiting import until

from memconsole import __version__
from memconsole import actions as do
from memconsole.backend.wire import inline, protocol
from memconsole.backend.wire.client import Client
from memconsole.backend.wire.inline import InlinePart, InlineSegment
from memconsole.backend.wire.remote import Remote
from memconsole.backend.wire.serving import RunningService, serve_in_thread
from memconsole.cli import main
from memconsole.errors import ExitCode, Gone, MemconsoleError, NoControl, Refused, UsageError, WireError

M = 1 << 20
HELLO = "io.memconsole.Hello"


class WithMemory(ServedSource):
    """A source whose regions have this content, in one segment with holes."""

    contents = b""

    def open_readonly(self, region: str, *, peer: str = "") -> tuple[int, ...]:
        self.peers.append(peer)
        fd = os.memfd_create("segment")
        os.ftruncate(fd, len(self.contents))
        for at in range(0, len(self.contents), 4096):
            if any(page := self.contents[at : at + 4096]):
                os.pwrite(fd, page, at)
        return (fd,)


@pytest.fixture
def source() -> WithMemory:
    return WithMemory(snapshot(20, 5))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run" / "control"


@pytest.fixture
def serving(source: WithMemory, path: Path) -> Iterator[RunningService]:
    handle = serve_in_thread(source, path)
    yield handle
    handle.close()


@pytest.fixture
def there(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Remote:
    """A host whose commands run here."""
    monkeypatch.setenv("PATH", f"{memconsole_in(tmp_path)}:{os.environ['PATH']}")
    monkeypatch.setenv("MEMCONSOLE_SSH", str(as_ssh(tmp_path)))
    return Remote("op@there", str(path))


def test_what_is_seen_and_done_over_a_bridge_is_what_is_seen_and_done_here(
    serving: RunningService, source: WithMemory, there: Remote, path: Path
) -> None:
    with closing(Client(there)) as far, closing(Client(path)) as near:
        assert (far.label, far.version) == ("op@there", __version__)
        assert far.snapshot() == near.snapshot()
        key = f"region:{source.snapshot().regions[0].name}"
        with far.extents(key) as table, near.extents(key) as same:
            assert table.rows() == same.rows()
            assert (table.pages, table.page_size) == (same.pages, same.page_size)
        assert not far.plan(do.Reserve("fresh", M)).refusals
        assert far.apply(do.Reserve("fresh", M)).subject == "fresh"
        assert far.events(0)[-1].subject == "fresh"
        assert far.doctor() == near.doctor()
        watched = far.watch(0.25)
        assert next(watched) == near.snapshot()
        watched.close()
        with pytest.raises(Refused) as refused:
            far.open_region("fresh")
        assert refused.value.code == "NoDescriptors"


def test_a_large_table_comes_by_parts_and_leaves_nothing_open(
    serving: RunningService, source: WithMemory, there: Remote, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inline, "PART", 256)
    key = f"guest:{source.snapshot().guests[0].name}"
    with closing(Client(there)) as far:
        far.snapshot()
        with nothing_stays_open(), far.extents(key) as table:
            rows = table.rows()
        assert len(rows) * 24 > 10 * 256
        with source.extents(key) as whole:
            assert rows == whole.rows()


def test_a_region_is_copied_from_there_with_its_holes(
    serving: RunningService, source: WithMemory, there: Remote, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    contents = bytearray(6 * M)
    contents[M : M + 5] = b"hello"
    contents[3 * M : 5 * M] = os.urandom(2 * M)
    source.contents = bytes(contents)
    to = tmp_path / "copy"
    words = ["--host", there.host, "--socket", there.socket]
    assert main([*words, "copy", source.snapshot().regions[0].name, str(to), "--json"]) == ExitCode.DONE
    said = json.loads(capsys.readouterr().out)
    assert (said["size"], said["copied"]) == (6 * M, 4096 + 2 * M)
    assert to.read_bytes() == source.contents
    assert to.stat().st_blocks * 512 < 4 * M


def test_commands_are_those_of_the_host_that_is_named(
    serving: RunningService, source: WithMemory, there: Remote, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("MEMCONSOLE_HOST", there.host)
    words = ["--socket", there.socket]
    assert main([*words, "regions", "--json"]) == ExitCode.DONE
    names = [each["name"] for each in json.loads(capsys.readouterr().out)]
    assert names == [each.name for each in source.snapshot().regions]
    assert main([*words, "reserve", "from-afar", "64M"]) == ExitCode.DONE
    assert len(source.peers) == 1
    assert main([*words, "doctor", "--json"]) == ExitCode.DONE
    assert main(["--host", "", "--socket", "/nowhere", "reserve", "no", "1M"]) == ExitCode.NO_CONTROL
    assert main(["schema"]) == ExitCode.DONE
    assert main(["--host", "there", "serve"]) == ExitCode.USAGE
    assert "cannot be run on there from here" in capsys.readouterr().err


def test_a_command_never_falls_back_from_another_host_to_this_one(
    there: Remote, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--host", there.host, "--socket", there.socket, "regions"]) == ExitCode.NO_CONTROL
    said = capsys.readouterr()
    assert said.out == ""
    assert "no control process answers on op@there: " in said.err
    assert "there is no such socket" in said.err


FAILURES = {
    "HostKeyChanged": "echo '@ WARNING: REMOTE HOST IDENTIFICATION HAS CHANGED! @' >&2; exit 255",
    "HostKeyUnknown": "echo 'Host key verification failed.' >&2; exit 255",
    "SshDenied": "echo 'op@there: Permission denied (publickey,password).' >&2; exit 255",
    "HostUnknown": "echo 'ssh: Could not resolve hostname there: Name or service not known' >&2; exit 255",
    "HostUnreachable": "echo 'ssh: connect to host there port 22: Connection refused' >&2; exit 255",
    "NotInstalled": "echo 'sh: 1: memconsole: not found' >&2; exit 127",
    "ProtocolVersion": "echo \"memconsole: invalid choice: 'bridge' (choose from 'serve')\" >&2; exit 2",
    "NoSocket": "echo 'memconsole: no control process answers at /x: there is no such socket' >&2; exit 5",
    "SshFailed": "echo 'muxserver: something of its own' >&2; exit 255",
    "NotVarlink": "printf 'Welcome to there!\\0'; exec sleep 60",
}


@pytest.mark.parametrize("code", FAILURES)
def test_what_ssh_says_is_what_is_said(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEMCONSOLE_SSH", str(as_ssh(tmp_path, FAILURES[code])))
    with pytest.raises((NoControl, WireError)) as failed:
        Client(Remote("op@there"))
    assert failed.value.code == code
    assert "there" in failed.value.what
    assert failed.value.remedy


def test_what_a_host_says_is_shown_and_never_obeyed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    program = as_ssh(tmp_path, "printf 'evil \\033]52;c;eA==\\007\\033[2J\\n' >&2; exit 255")
    monkeypatch.setenv("MEMCONSOLE_SSH", str(program))
    assert main(["--host", "there", "regions"]) == ExitCode.NO_CONTROL
    said = capsys.readouterr().err
    assert "evil" in said
    assert said.isascii()
    assert "\033" not in said
    assert "\007" not in said


def test_a_host_that_floods_what_it_says_besides_holds_nothing_up_and_is_not_kept(
    serving: RunningService, there: Remote, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flood = 'head -c 4000000 /dev/zero | tr "\\0" x >&2; exec sh -c "$*"'
    monkeypatch.setenv("MEMCONSOLE_SSH", str(as_ssh(tmp_path, flood)))
    with closing(Client(there)) as far:
        assert far.snapshot().regions


@pytest.mark.parametrize("host", ["", "-oProxyCommand=touch /tmp/x", "op@-oProxyCommand=x", "a b", "a\nb", "ssh://-x"])
def test_a_host_is_never_an_option(host: str) -> None:
    with pytest.raises(UsageError):
        Remote(host).dial(first=True)


def test_a_program_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEMCONSOLE_SSH", "/nowhere/ssh")
    with pytest.raises(NoControl) as failed:
        Client(Remote("there"))
    assert failed.value.code == "NoSsh"


def test_a_line_that_is_cut_is_named_and_the_next_question_gets_another(
    serving: RunningService, source: WithMemory, there: Remote
) -> None:
    with closing(Client(there)) as far:
        cut = threading.Event()

        def drop_all() -> None:
            for connection in list(serving.loop._connections.values()):
                serving.loop.drop(connection)

        def fall() -> None:
            if not cut.is_set():
                cut.set()
                serving.loop.call(drop_all)
                until(lambda: not len(serving.loop), "every connection is dropped")

        source.on_snapshot = fall
        with pytest.raises(NoControl) as lost:
            far.snapshot()
        assert lost.value.code == "ControlDied"
        assert far.snapshot().regions


def test_an_older_service_is_refused_with_both_versions(
    there: Remote, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path.parent.mkdir()
    answers = [
        {"error": "org.varlink.service.InvalidParameter", "parameters": {"parameter": "inline"}},
        {"parameters": {"version": "0.0.1"}},
    ]
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()

        def serve() -> None:
            sock, _ = listener.accept()
            with sock:
                for answer in answers:
                    sock.recv(65536)
                    sock.sendall(json.dumps(answer).encode() + b"\0")
                sock.recv(1)

        thread = threading.Thread(target=serve)
        thread.start()
        with pytest.raises(WireError) as refused:
            Client(there)
        thread.join()
    assert refused.value.code == "ProtocolVersion"
    assert "0.0.1" in refused.value.what
    assert __version__ in refused.value.what


# --- what is on the wire ---


def test_a_bridge_answers_what_came_before_its_stdin_ended(serving: RunningService, path: Path, there: Remote) -> None:
    call = b'{"method":"org.varlink.service.GetInfo"}\0'
    command = ["memconsole", "--socket", str(path), "bridge"]
    ended = subprocess.run(command, input=call + call, capture_output=True, check=True)
    said = [json.loads(each) for each in ended.stdout.split(b"\0") if each]
    assert [each["parameters"]["version"] for each in said] == [__version__] * 2


def test_only_what_the_last_answer_lent_can_be_read(serving: RunningService, source: WithMemory, path: Path) -> None:
    source.contents = os.urandom(3 * M)
    with Raw(path) as peer:
        peer.call(HELLO, protocol=protocol.PROTOCOL, inline=True)
        peer.receive()
        peer.call("io.memconsole.OpenRegion", region="web")
        first = peer.receive()["parameters"]
        assert (first["fds"], first["inline"][0]["size"], first["inline"][0]["length"]) == ([0], 3 * M, inline.PART)
        for fd, at, error in ((0, M, ""), (1, 0, "NotFound"), (-1, 0, "NotFound"), (0, -1, "InvalidParameter")):
            peer.call("io.memconsole.ReadDescriptor", fd=fd, at=at)
            assert peer.receive().get("error", "").rpartition(".")[2] == error
        peer.call("io.memconsole.ReadDescriptor", fd=0, at=5 * M)
        assert peer.receive()["parameters"]["length"] == 0
        peer.call("io.memconsole.ReadDescriptor", fd=0, at=0)
        assert peer.receive()["error"] == "io.memconsole.NotFound", "it was read up"


@pytest.mark.parametrize(
    "changed",
    [
        {"data": "not base64"},
        {"data": "AAAA"},
        {"length": 5},
        {"length": inline.PART + 1},
        {"length": -1},
        {"at": -1},
        {"size": 1},
        {"at": 1 << 40},
    ],
)
def test_a_part_that_is_none_is_a_named_error(changed: dict[str, object]) -> None:
    fd = os.memfd_create("part")
    try:
        os.pwrite(fd, b"0123456789", 0)
        good = inline.part(fd, 0)
    finally:
        os.close(fd)
    assert inline.unpacked(good, 0, "it") == b"0123456789"
    bad = InlinePart(**{"size": 10, "at": 0, "length": 10, "data": good.data, **changed})  # type: ignore[arg-type]
    with pytest.raises(WireError):
        inline.unpacked(bad, 0, "it")


def test_a_part_that_inflates_to_more_than_it_says_is_refused(tmp_path: Path) -> None:
    fd = os.memfd_create("bomb")
    try:
        os.pwrite(fd, b"\0" * inline.PART, 0)
        bomb = inline.part(fd, 0)
    finally:
        os.close(fd)
    with pytest.raises(WireError):
        inline.unpacked(InlinePart(16, 0, 16, bomb.data), 0, "it")


def test_a_file_that_goes_back_or_shrinks_ends_with_an_error() -> None:
    def part(size: int, at: int, contents: bytes) -> InlinePart:
        fd = os.memfd_create("part")
        try:
            os.pwrite(fd, contents, 0)
            return InlinePart(size, at, len(contents), inline.part(fd, 0).data)
        finally:
            os.close(fd)

    for following, error in ((part(20, 0, b"again"), WireError), (part(10, 5, b"rest!"), Gone)):
        segment = InlineSegment(part(20, 0, b"first"), lambda _, found=following: found, "it")  # type: ignore[misc]
        with pytest.raises(error):
            list(segment.data())
    huge = InlineSegment(part(inline.MAX_TABLE + 1, 0, b"x"), lambda _: part(1, 0, b""), "it")
    with pytest.raises(MemconsoleError):
        inline.whole(huge, "it")
