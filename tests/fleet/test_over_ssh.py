"""One host from afar over a real sshd on a loopback port, with keys and configuration of the tests' own."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from support.remotes import SSHD, SshHost, memconsole_in, ssh_host
from support.served import ServedSource
from support.synthetic import snapshot

from memconsole.backend.wire.client import Client
from memconsole.backend.wire.remote import Remote
from memconsole.backend.wire.serving import serve_in_thread
from memconsole.cli import main
from memconsole.errors import ExitCode, NoControl

pytestmark = [
    pytest.mark.skipif(not SSHD, reason="there is no sshd: apt install openssh-server"),
    pytest.mark.skipif(shutil.which("ssh") is None, reason="there is no ssh: apt install openssh-client"),
]


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SshHost]:
    directory = tmp_path_factory.mktemp("sshd")
    with ssh_host(directory, f"{memconsole_in(directory)}:{os.environ['PATH']}") as found:
        yield found


@pytest.fixture
def source() -> ServedSource:
    return ServedSource(snapshot(20, 5))


@pytest.fixture
def there(host: SshHost, source: ServedSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Remote]:
    path = tmp_path / "control"
    monkeypatch.setenv("MEMCONSOLE_SSH", host.ssh)
    with closing(serve_in_thread(source, path)):
        yield Remote(host.name, str(path))


def test_every_kind_of_question_is_answered_over_ssh(
    there: Remote, source: ServedSource, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--host", there.host, "--socket", there.socket]
    region = source.snapshot().regions[0].name
    assert main([*words, "regions", "--json"]) == ExitCode.DONE
    assert json.loads(capsys.readouterr().out)[0]["name"] == region
    assert main([*words, "pfn", region, "--json"]) == ExitCode.DONE
    assert json.loads(capsys.readouterr().out)["extents"]
    assert main([*words, "reserve", "from-afar", "64M"]) == ExitCode.DONE
    assert len(source.peers) == 1
    assert main([*words, "snapshot", "--view", "guests", "--plain"]) == ExitCode.DONE
    assert source.snapshot().guests[0].name in capsys.readouterr().out


def test_what_ssh_refuses_is_shown_as_what_it_is(
    host: SshHost, there: Remote, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*options: str) -> NoControl:
        monkeypatch.setenv("MEMCONSOLE_SSH", " ".join([host.ssh, *options]))
        with pytest.raises(NoControl) as found:
            Client(there)
        return found.value

    nobody = tmp_path / "known_hosts"
    nobody.touch()
    assert refused("-o", f"UserKnownHostsFile={nobody}").code == "HostKeyUnknown"
    key = (host.directory / "key.pub").read_text().split()
    nobody.write_text(f"[127.0.0.1]:{host.port} {key[0]} {key[1]}\n")
    assert refused("-o", f"UserKnownHostsFile={nobody}").code == "HostKeyChanged"
    assert refused("-i", str(host.directory / "host_key"), "-o", "User=nobody").code == "SshDenied"
    assert refused("-p", "1").code == "HostUnreachable"
    assert refused("-o", "HostName=nosuch.invalid").code == "HostUnknown"


def test_a_host_without_a_service_says_so(there: Remote, tmp_path: Path) -> None:
    with pytest.raises(NoControl) as found:
        Client(Remote(there.host, str(tmp_path / "nothing")))
    assert (found.value.code, found.value.why.rpartition(": ")[2]) == ("NoSocket", "there is no such socket")


def test_a_shared_connection_carries_every_line(
    host: SshHost, there: Remote, source: ServedSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = tmp_path / "shared"
    options = f"-o ControlMaster=auto -o ControlPath={shared} -o ControlPersist=30"
    monkeypatch.setenv("MEMCONSOLE_SSH", f"{host.ssh} {options}")
    try:
        with closing(Client(there)) as far:
            assert shared.exists()
            watched = far.watch(0.25)
            assert next(watched).regions
            assert far.snapshot() == source.snapshot()
            watched.close()
    finally:
        os.system(f"{host.ssh} -o ControlPath={shared} -O exit {there.host} 2>/dev/null")
