"""``memconsole serve --mount``: grants as files, through the deaths of the service and of the mount's server."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import controls
from support.guests import fd_links
from support.mounted import SIZE, Place, places, unexpected
from support.mounts import NOBODY, STRANGER, end_at, mounted_below, unmount, wait_gone
from support.services import services
from support.waiting import LONG_S, until

from memconsole import actions as do
from memconsole.backend.exports.fuse import EntryKind, FuseTree
from memconsole.backend.peers.handle import stat
from memconsole.cli import main
from memconsole.errors import ExitCode, GuestError, MemconsoleError, Refused
from memconsole.model import Access, GrantState, GuestState, Progress, RevokeOutcome, Rung

M = controls.M
ELSEWHERE = ["--user", "--map-root-user", "--mount"]
NOTHING = Progress("process", 0, 0, 0, 0, 0)


@pytest.fixture
def place() -> Iterator[Place]:
    with places() as place:
        yield place


def test_a_process_maps_its_grant_by_path_without_an_agent(place: Place) -> None:
    user, stranger = place.user(), place.user(STRANGER)
    path = place.grant(user)
    found = path.stat()
    assert (found.st_uid, found.st_mode & 0o777, found.st_size) == (NOBODY, 0o600, SIZE)
    assert place.shown().grants[0].state is GrantState.OFFERED
    assert [user.do("open", path), user.do("map"), user.do("write", "hello")] == ["done"] * 3
    assert stranger.do("open", path) == "Permission denied"
    shown = place.shown()
    grant, guest = shown.grants[0], controls.guest(shown, "web")
    assert grant.state is GrantState.MAPPED
    assert grant.export == "file"
    assert [(seen.pid, seen.end - seen.start, seen.offset) for seen in grant.seen] == [(user.pid, SIZE, 0)]
    assert controls.region(shown, "pool").seen is not None
    assert controls.region(shown, "pool").seen.mappers == (user.pid,)  # type: ignore[union-attr]
    assert guest.seen is not None
    assert [(block.region, block.size) for block in guest.seen.ram if block.region] == [("pool", SIZE)]
    assert not unexpected(shown)
    assert place.owners("pool").read_bytes()[:5] == b"hello"

    kept = path.parents[1] / "status"

    def told() -> list[int]:
        status = json.loads(kept.read_text())
        assert status["guest"]["name"] == "web"
        return [seen["pid"] for seen in status["grants"][0]["seen"]]

    until(lambda: kept.exists() and told() == [user.pid], "its status follows")
    assert (path.parents[1] / "pfnmap").read_text().strip()
    assert user.do("unmap") == "done"
    assert place.shown().grants[0].state is GrantState.OFFERED


def test_what_is_no_whole_region_is_no_file_and_goes_by_fd(place: Place) -> None:
    user = place.user()
    place.client.apply(do.Reserve("pool", SIZE))
    place.client.apply(do.GuestAttach("web", user.pid))
    place.client.apply(do.Map("pool", "web", length=M, access=Access.RO))
    assert not place.path("web", "pool").exists()
    assert place.shown().grants[0].export == "fd"
    assert place.owners("pool").stat().st_size == SIZE
    place.revoke()
    place.client.apply(do.Map("pool", "web", access=Access.RO))
    assert place.path("web", "pool").stat().st_mode & 0o777 == 0o400
    place.revoke("g2")
    place.client.apply(do.GuestStop("web"))
    place.client.apply(do.Release("pool"))
    assert list((place.point / "guests").iterdir()) == list((place.point / "regions").iterdir()) == []


def test_revoke_takes_a_mapping_by_path_and_keeps_the_contents(place: Place) -> None:
    user = place.user()
    path = place.grant(user)
    assert [user.do("open", path), user.do("map"), user.do("write", "secret")] == ["done"] * 3
    with pytest.raises(GuestError) as error:
        place.revoke(at_most=Rung.ASK)
    assert error.value.code == "StillMapped"
    assert user.do("open", path) == "done", "a revoke that failed leaves the path as it was"
    report = place.revoke()
    assert report.rung is Rung.COPY
    assert report.outcome in {RevokeOutcome.PROVED, RevokeOutcome.CUT}
    assert user.do("open", path) == "No such file or directory"
    assert place.owners("pool").read_bytes()[:6] == b"secret"
    assert not unexpected(place.shown())
    assert user.do("read") == ""
    assert user.end() == -signal.SIGBUS


def test_a_file_that_is_only_open_is_no_way_back(place: Place) -> None:
    user = place.user()
    path = place.grant(user)
    assert [user.do("open", path), user.do("map"), user.do("write", "secret"), user.do("unmap")] == ["done"] * 4
    with pytest.raises(GuestError, match=f"held by {user.pid}"):
        place.revoke(at_most=Rung.ASK)
    assert user.do("send") == "done"
    user.do("close")  # the descriptor is in a socket now, in nobody's table
    report = place.revoke()
    assert report.outcome is RevokeOutcome.PROVED
    assert user.do("receive") == "done"
    mapped = user.do("map")
    assert mapped != "done" or user.do("read") == "", "there is nothing behind it"
    assert place.owners("pool").read_bytes()[:6] == b"secret"


def test_a_file_that_is_mounted_elsewhere_under_another_name_is_the_same_file(place: Place) -> None:
    """As a container gets one: its maps and its descriptors show that name, and no path of the mount."""
    user, other = place.user(), place.user(0)
    path, image = place.grant(user), place.service.directory / "vm.img"
    image.touch()
    subprocess.run(["mount", "--bind", path, image], check=True, timeout=60)
    place.at_end(lambda: subprocess.run(["umount", "-l", image], check=True, timeout=60))
    assert [other.do("open", image), other.do("map"), other.do("write", "secret")] == ["done"] * 3
    assert str(image) in Path(f"/proc/{other.pid}/maps").read_text()
    shown = place.shown()
    assert controls.region(shown, "pool").seen.mappers == (other.pid,)  # type: ignore[union-attr]
    (finding,) = (each for each in shown.findings if each.id == "mapping-unknown")
    assert str(other.pid) in finding.observed
    assert "guests/web/ram/pool" in finding.evidence
    assert other.do("unmap") == "done"
    with pytest.raises(GuestError, match=f"held by {other.pid}"):
        place.revoke(at_most=Rung.ASK)
    assert place.revoke().outcome in {RevokeOutcome.PROVED, RevokeOutcome.CUT}
    mapped = other.do("map")
    assert mapped != "done" or other.do("read") == "", "there is nothing behind it"
    assert place.owners("pool").read_bytes()[:6] == b"secret"


GOES_ON = """
import ctypes, os, sys, threading, time
from memconsole.agent import Agent
agent = Agent(sys.argv[1])
view = memoryview(agent.wait("g1", 60).memory)[:8]
def work():
    count = 0
    while True:
        count += 1
        view[:] = count.to_bytes(8, "little")
        time.sleep(0.01)
threading.Thread(target=work).start()
print("mapped", flush=True)
ctypes.CDLL(None).syscall({"x86_64": 60, "aarch64": 93, "riscv64": 93}[os.uname().machine], 0)
"""
"""A process that takes a grant, and whose first thread leaves while another one writes on."""


def test_a_guest_whose_first_thread_has_left_is_there_and_is_revoked_from(place: Place) -> None:
    words = [sys.executable, "-c", GOES_ON, str(place.service.runtime / "agents")]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as child:
        place.at_end(child.kill)
        assert child.stdout is not None
        place.client.apply(do.Reserve("pool", SIZE))
        place.client.apply(do.GuestAttach("db", child.pid))
        place.client.apply(do.Map("pool", "db"))
        assert child.stdout.readline() == "mapped\n"
        until(lambda: stat(child.pid)[0] == "Z", "its first thread has left")
        shown = place.shown()
        assert controls.guest(shown, "db").state is GuestState.RUNNING
        assert [seen.pid for seen in shown.grants[0].seen] == [child.pid]
        assert not [each for each in shown.findings if each.id.startswith(("guest-", "grant-", "mapping-"))]
        place.restart()
        assert controls.guest(place.shown(), "db").state is GuestState.RUNNING, "the next service has it again"
        report = place.revoke()
        assert report.rung in {Rung.COPY, Rung.KILL}
        assert report.outcome in {RevokeOutcome.PROVED, RevokeOutcome.CUT}
        until(lambda: child.poll() is not None, "it found nothing behind what it mapped, or was ended")
    assert int.from_bytes(place.owners("pool").read_bytes()[:8], "little") > 0, "the contents are whole"
    assert not unexpected(place.shown())


def test_a_file_in_flight_is_no_way_back_from_a_guest_of_ours_either(place: Place) -> None:
    """A canary gives back what it maps; who opened its file, and hid that, must not keep it."""
    root = place.user(0)
    place.client.apply(do.GuestStart("vm", memory=SIZE))
    place.service.guests.add(controls.guest(place.shown(), "vm").pid or 0)
    assert root.do("open", place.path("vm", "vm")) == "done"
    root.do("send")
    root.do("close")
    before = place.owners("vm").stat().st_ino
    place.revoke()
    assert place.owners("vm").stat().st_ino != before, "the contents are elsewhere"
    assert root.do("receive") == "done"
    assert root.do("map") != "done" or root.do("read") == ""


def test_service_and_server_die_and_the_tree_comes_back(place: Place) -> None:
    user = place.user()
    path = place.grant(user)
    assert [user.do("open", path), user.do("map"), user.do("write", "kept")] == ["done"] * 3
    inode = path.stat().st_ino
    place.restart()
    assert path.stat().st_ino == inode, "the server went on"
    assert place.shown().grants[0].state is GrantState.MAPPED
    old = place.kill_server()
    place.mounted_anew(old)
    until(path.exists, "its file is there again")
    shown = place.shown()
    assert [seen.pid for seen in shown.grants[0].seen] == [user.pid], "a mapping made under the dead server"
    assert not unexpected(shown)
    place.kill_server()
    place.restart()
    assert [seen.pid for seen in place.shown().grants[0].seen] == [user.pid]
    assert place.owners("pool").read_bytes()[:4] == b"kept"
    assert user.do("read") == "kept"
    assert place.revoke().rung is Rung.COPY
    assert user.do("read") == ""
    assert user.end() == -signal.SIGBUS
    assert place.owners("pool").read_bytes()[:4] == b"kept"


@pytest.mark.parametrize("point", ["ask.before", "copy.stopped", "move.committed", "move.replaced"])
def test_a_revoke_whose_service_dies_ends_on_the_mount_too(place: Place, point: str) -> None:
    user = place.user()
    path = place.grant(user)
    assert [user.do("open", path), user.do("map"), user.do("write", "secret")] == ["done"] * 3
    place.restart(f"revoke.{point}")
    with pytest.raises(MemconsoleError):
        place.revoke()
    assert place.service.process is not None
    assert place.service.process.wait(LONG_S) == -signal.SIGKILL
    assert place.user(0).do("open", path) == "Permission denied", "not even root, from the first rung on"
    place.restart()
    shown = place.shown()
    assert shown.grants == ()
    assert not unexpected(shown)
    assert user.do("open", path) == "No such file or directory"
    assert place.owners("pool").read_bytes()[:6] == b"secret"
    assert user.do("read") == ""
    assert user.end() == -signal.SIGBUS


def test_the_owner_of_a_file_follows_the_process(place: Place) -> None:
    """A daemon is attached as root, and gives that up later."""
    code = "import os,sys; print(1,flush=True); input(); os.setuid(int(sys.argv[1])); print(2,flush=True); input()"
    command = [sys.executable, "-c", code, str(NOBODY)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as daemon:
        assert daemon.stdout is not None
        assert daemon.stdin is not None
        assert daemon.stdout.readline() == "1\n"
        place.client.apply(do.Reserve("pool", SIZE))
        place.client.apply(do.GuestAttach("db", daemon.pid))
        place.client.apply(do.Map("pool", "db"))
        path = place.path("db", "pool")
        assert path.stat().st_uid == 0
        daemon.stdin.write("\n")
        daemon.stdin.flush()
        assert daemon.stdout.readline() == "2\n"
        until(lambda: path.stat().st_uid == NOBODY, "the file follows its process to its user")
        daemon.kill()


def test_a_rehearsal_leaves_every_file_as_it_was(place: Place) -> None:
    place.client.apply(do.GuestStart("web", memory=16 * M))
    path = place.path("web", "web")
    before = path.stat()
    place.client.apply(do.HandoffRehearse())
    after = path.stat()
    assert (after.st_ino, after.st_uid, after.st_mode) == (before.st_ino, before.st_uid, before.st_mode)

    def leads_to_the_region() -> bool:
        with place.client.extents("region:web") as table:
            return place.frames(path) == [row.pfn + n for row in table for n in range(row.count)]

    until(leads_to_the_region, "the file has the region's frames")  # in a rehearsal the kernel may move one meanwhile
    assert not unexpected(place.shown())
    place.client.apply(do.GuestStop("web"))


def test_another_process_takes_the_place_of_one_that_ended(place: Place) -> None:
    """The grant and its file stay when a database ends; the next one of the same name has them."""
    user, next_user = place.user(), place.user()
    place.client.apply(do.Reserve("pool", SIZE))
    place.client.apply(do.GuestAttach("db", user.pid))
    with pytest.raises(Refused):
        place.client.apply(do.GuestAttach("db", next_user.pid))
    place.client.apply(do.Map("pool", "db"))
    path = place.path("db", "pool")
    assert user.do("open", path) == "done"
    assert user.do("map") == "done"
    assert user.do("write", "stands") == "done"
    user.end()
    place.kill_server()
    place.restart()
    assert path.stat().st_uid == NOBODY, "whose it was is not forgotten with the process and the server"
    place.client.apply(do.GuestAttach("db", next_user.pid))
    assert next_user.do("open", path) == "done"
    assert next_user.do("map") == "done"
    assert next_user.do("read") == "stands"
    shown = place.shown()
    assert controls.guest(shown, "db").pid == next_user.pid
    assert shown.grants[0].state is GrantState.MAPPED
    assert not unexpected(shown)


def test_a_mount_never_hides_the_service(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    runtime = tmp_path / "guests/run"
    state = tmp_path / "regions"
    for words in (["--socket", f"{runtime}/control"], ["--socket", f"{tmp_path}/run/control"]):
        words += ["serve", "--foreground", "--state-dir", str(state), "--mount", str(tmp_path)]
        assert main(words) == ExitCode.REFUSED
        said = capfd.readouterr().err
        assert "would hide" in said
        assert "serve --mount" in said
    assert not state.exists()


def test_a_mount_at_a_file_is_refused_before_anything_begins(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "notes").write_text("mine")
    words = ["--socket", f"{tmp_path}/run/control", "serve", "--foreground", "--mount", f"{tmp_path}/notes"]
    assert main([*words, "--state-dir", f"{tmp_path}/state"]) == ExitCode.REFUSED
    said = capfd.readouterr().err
    assert "it is a file" in said
    assert "give --mount a directory" in said
    assert not (tmp_path / "run").exists()


def test_the_tree_lies_beside_the_sockets_by_default(place: Place) -> None:
    """``serve --mount`` with nothing else shows the tree in the runtime directory."""
    service = place.service
    place.stop()
    service.start("--mount")
    place.client = service.client()
    place.point = service.runtime
    user = place.user()
    path = place.grant(user)
    assert path == service.runtime / "guests/web/ram/pool"
    assert [user.do("open", path), user.do("map"), user.do("write", "kept")] == ["done"] * 3
    assert service.path.is_socket(), "nothing of the service is hidden"
    assert (service.runtime / "agents").is_socket()
    assert user.do("open", service.runtime / "mount/tree/guests/web/ram/pool") == "Permission denied", "one way in"
    old = place.kill_server()
    assert user.do("open", path) == "Transport endpoint is not connected"
    place.mounted_anew(old)
    until(lambda: user.do("open", path) == "done", "mounted anew, in the same place")
    place.stop()
    assert user.do("open", path) == "done", "without the service"
    service.start("--mount")
    place.client = service.client()
    with contextlib.closing(FuseTree(service.runtime / "fuse")) as tree:
        assert tree.pid != old
    assert len(mounted_below(service.runtime)) == 4, "nothing is mounted twice"
    assert not unexpected(place.shown())
    assert place.revoke().rung is Rung.COPY
    assert user.do("open", path) == "No such file or directory"
    assert user.do("read") == ""


def test_what_somebody_unmounts_is_mounted_again(place: Place) -> None:
    parts = ["files", "guests", "regions"]
    for name in parts:
        subprocess.run(["umount", place.point / name], check=True)

    def again() -> bool:
        return sorted(path.name for path in mounted_below(place.point)) == parts

    until(again, "they are mounted again")


def test_a_mount_in_use_stays_whole_when_its_server_is_told_to_end(place: Place) -> None:
    user = place.user()
    path = place.grant(user)
    assert [user.do("open", path), user.do("map"), user.do("write", "kept")] == ["done"] * 3
    before = mounted_below(place.point)
    with contextlib.closing(FuseTree(place.service.runtime / "fuse")) as tree:
        place.stop()
        user.do("close")
        with pytest.raises(Refused, match="in use"):
            unmount(tree)
        os.kill(tree.pid, signal.SIGTERM)
        assert tree.status().entries
        assert mounted_below(place.point) == before
        assert user.do("open", path) == "done"
        assert [user.do("close"), user.do("unmap")] == ["done"] * 2
        until(lambda: _unmounts(tree), "files are let go of")
        wait_gone(tree.pid)
    assert mounted_below(place.service.directory) == []


def _unmounts(tree: FuseTree) -> bool:
    try:
        unmount(tree)
    except Refused:
        return False
    return True


def test_files_of_others_are_not_hidden(place: Place) -> None:
    other = place.service.directory / "other"
    (other / "guests").mkdir(parents=True)
    (other / "guests/photo").touch()
    place.stop()
    place.service.start("--mount", str(other))
    place.client = place.service.client()
    findings = {finding.id: finding for finding in place.shown().findings}
    assert "would hide photo" in findings["mount-behind"].evidence
    (other / "guests/photo").unlink()
    until(lambda: "mount-behind" not in {finding.id for finding in place.shown().findings})
    assert (other / "regions").is_mount()


def test_where_the_kernel_passes_no_memory_through_the_mount_says_so_and_fds_remain() -> None:
    """In a user namespace: a kernel that refuses the first memfd, as one without passthrough refuses the offer."""
    if os.geteuid() or subprocess.run(["unshare", *ELSEWHERE, "true"], check=False).returncode:
        pytest.skip("no user namespaces here")
    with services() as service, contextlib.ExitStack() as stack:
        stack.callback(lambda: end_at(service.runtime, service.directory))
        service.start("--mount", str(service.directory / "mnt"), launcher=["unshare", *ELSEWHERE])
        client = stack.enter_context(contextlib.closing(service.client()))
        client.apply(do.GuestStart("web", memory=16 * M))
        shown = client.snapshot()
        service.guests.add(controls.guest(shown, "web").pid or 0)
        (finding,) = [finding for finding in shown.findings if finding.id.startswith("mount-")]
        assert (finding.id, finding.observed) == (
            "mount-without-ram",
            "the mount shows no memory: passing memory through needs CAP_SYS_ADMIN",
        )
        assert "fd export" in finding.remedy
        with contextlib.closing(FuseTree(service.runtime / "fuse")) as tree:
            kinds = {entry.path: entry.kind for entry in tree.list()}
        assert kinds["guests/web/ram"] is EntryKind.DIR
        assert EntryKind.RAM not in kinds.values()
        until(
            lambda: (controls.guest(client.snapshot(), "web").progress or NOTHING).beats > 5, "it runs on what it has"
        )
        assert shown.grants[0].state is GrantState.MAPPED


def test_the_doctor_says_that_memory_can_be_files(place: Place, capfd: pytest.CaptureFixture[str]) -> None:
    main(["doctor", "--json"])
    checks = json.loads(capfd.readouterr().out)
    found = checks if isinstance(checks, list) else checks["capabilities"]
    assert next(each["level"] for each in found if each["id"] == "fuse-passthrough") == "yes"


def truncate(place: Place, region: str, size: int) -> None:
    """As a guest can that has the region's descriptor."""
    assert place.service.process is not None
    for link, said in fd_links(place.service.process.pid).items():
        if f"/memfd:memconsole:{region}:0" in said:
            os.truncate(link, size)
            return
    raise AssertionError(f"the service does not hold {region}")


@pytest.mark.parametrize("left", [0, M])
def test_a_guest_that_truncates_its_memory_is_named_and_harms_no_other(place: Place, left: int) -> None:
    bad, good = place.user(), place.user(STRANGER)
    place.grant(bad)
    truncate(place, "pool", left)
    path = place.grant(good, name="good", region="other")
    assert [good.do("open", path), good.do("map"), good.do("write", "hello")] == ["done"] * 3
    found = {finding.id: finding for finding in place.shown().findings}
    assert "mount-behind" not in found
    assert found["region-truncated"].subject == "pool"
    assert "guest web truncated it" in found["region-truncated"].observed
    place.mounted_anew(place.kill_server())
    until(path.exists, "its file is there again")
    place.shown()
    assert "mount-behind" not in {finding.id for finding in place.shown().findings}
    place.restart()
    assert "region-truncated" in {finding.id for finding in place.shown().findings}
    assert place.client.apply(do.Revoke("g1")).revoke is not None
    place.client.apply(do.Release("pool"))
    assert "region-truncated" not in {finding.id for finding in place.shown().findings}
