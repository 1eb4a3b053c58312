"""Domains of users' session daemons, from files that those users write: believed no further than their processes go."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from support.domains import ALICE, MALLORY, UUID, host, place, qemu, status
from support.trees import Tree

from memconsole.backend.kernel import beneath
from memconsole.backend.managers import sessions
from memconsole.backend.observe.survey import SurveyInput, survey
from memconsole.model import Guest, Snapshot


def seen(tree: Tree) -> Snapshot:
    return survey(SurveyInput(), tree.root)


def by_pid(snapshot: Snapshot) -> dict[int | None, Guest]:
    return {guest.pid: guest for guest in snapshot.guests}


def test_a_domain_of_a_users_daemon_is_that_users(tmp_path: Path) -> None:
    (guest,) = seen(host(tmp_path)).guests
    assert guest.managed is not None
    assert (guest.name, guest.managed.user, guest.managed.uuid) == (f"web shop@{ALICE}", ALICE, UUID)
    assert guest.managed.by_virsh("managedsave") == f"virsh -c qemu:///session managedsave {UUID} (as user {ALICE})"


def test_a_file_takes_no_process_of_another_user_nor_hides_its_domain(tmp_path: Path) -> None:
    tree = host(tmp_path)
    qemu(tree, 400, 0)
    tree.write("/run/libvirt/qemu/web shop.xml", status(400))
    for name, pid in (("a.xml", 400), ("b.xml", 500), ("c.xml", 1)):
        tree.write(place(ALICE - 1, name), status(pid, name="mine"))
        tree.write(place(MALLORY, name), status(pid, name="mine"))
    found = by_pid(seen(tree))
    assert {pid: guest.name for pid, guest in found.items()} == {400: "web shop", 500: f"web shop@{ALICE}"}


def test_a_process_is_not_a_domain_without_its_uuid(tmp_path: Path) -> None:
    tree = host(tmp_path)
    qemu(tree, 501, MALLORY, "00000000-0000-0000-0000-000000000000")
    tree.write(place(MALLORY), status(501))
    assert by_pid(seen(tree))[501].managed is None


def _link(tree: Tree) -> None:
    tree.write("/etc/secret.xml", status(502))
    tree.link(place(MALLORY), str(tree.root / "etc/secret.xml"))


def _link_above(tree: Tree) -> None:
    tree.write("/srv/run/web shop.xml", status(502))
    tree.link(f"/run/user/{MALLORY}/libvirt/qemu/run", str(tree.root / "srv/run"))


def _fifo(tree: Tree) -> None:
    tree.directory(f"/run/user/{MALLORY}/libvirt/qemu/run")
    os.mkfifo(tree.root / place(MALLORY).lstrip("/"))


def _directory(tree: Tree) -> None:
    tree.directory(place(MALLORY))


def _large(tree: Tree) -> None:
    tree.write(place(MALLORY), status(502) + b" " * sessions.LARGEST)


def _numbers(tree: Tree) -> None:
    tree.write(place(MALLORY), status(502).replace(b"<memory unit='KiB'>196608<", b"<memory unit='KiB'>1<"))
    said = (tree.root / place(MALLORY).lstrip("/")).read_bytes()
    tree.write(place(MALLORY), re.sub(rb"<domain type='\w+' id='1'", b"<domain type='qemu' id='%d'" % (1 << 64), said))


@pytest.mark.parametrize("spoil", [_link, _link_above, _fifo, _directory, _large, _numbers])
def test_what_is_no_file_of_a_daemon_is_a_gap_and_costs_nobody_else(
    tmp_path: Path, spoil: Callable[[Tree], None]
) -> None:
    tree = host(tmp_path)
    qemu(tree, 502, MALLORY)
    spoil(tree)
    snapshot = seen(tree)
    found = by_pid(snapshot)
    assert found[502].managed is None
    assert found[500].name == f"web shop@{ALICE}"
    (gap,) = [gap for gap in snapshot.gaps if "/run/user" in gap.source]
    assert gap.source.startswith(f"/run/user/{MALLORY}/libvirt/qemu/run")


def test_of_too_many_files_some_are_read_and_a_gap_says_so(tmp_path: Path) -> None:
    tree = host(tmp_path)
    for number in range(sessions.DOMAINS_MOST + 6):
        tree.write(place(ALICE, f"x{number:03}.xml"), status(600 + number))
    (gap,) = [gap for gap in seen(tree).gaps if "/run/user" in gap.source]
    assert str(sessions.DOMAINS_MOST) in gap.why


def test_metadata_of_any_depth_costs_no_more_than_its_bytes(tmp_path: Path) -> None:
    tree = host(tmp_path)
    deep = b"<metadata>" + b"<a>" * 20_000 + b"x" + b"</a>" * 20_000 + b"</metadata>"
    tree.write(place(ALICE), re.sub(rb"<metadata>.*</metadata>", lambda _: deep, status(500), flags=re.DOTALL))
    (guest,) = seen(tree).guests
    assert guest.managed is not None
    assert guest.managed.labels == ()


@pytest.mark.skipif(os.geteuid() != 0, reason="a directory of another user's is made by root")
def test_on_a_live_host_the_directory_must_be_the_users_own(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in/file").write_text("")
    (tmp_path / "out").write_text("")
    (tmp_path / "in/link").symlink_to("../out")
    top = os.open(tmp_path / "in", os.O_PATH | os.O_DIRECTORY)
    try:
        os.close(beneath.opened(top, "file", os.O_RDONLY))
        for path in ("link", "../out", str(tmp_path / "out")):
            with pytest.raises(OSError, match=r"symbolic links|cross-device|Invalid"):
                beneath.opened(top, path, os.O_RDONLY)
    finally:
        os.close(top)
