"""What is put into libvirt's configuration: shown first, known again, never over what others changed, gone later."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest
from support.trees import Tree

from memconsole.backend.managers import domainxml, libvirt_host, libvirt_setup, plans
from memconsole.backend.managers.sealed import Standing
from memconsole.cli import main
from memconsole.errors import BadFile, NotFound, Refused

UUID = "c7a5fdbd-edaf-9455-926a-d65c16db1809"
HOOK, LOCAL = "etc/libvirt/hooks/qemu.d/50-memconsole", "etc/apparmor.d/local/abstractions/libvirt-qemu"
ORDER = "etc/systemd/system/libvirtd.service.d/50-memconsole.conf"
ABSTRACTION = "/etc/apparmor.d/abstractions/libvirt-qemu"
XML = f"<domain type='kvm' id='7'>\n  <name>web</name>\n  <uuid>{UUID}</uuid>\n{{}}</domain>\n"
DIGEST = "0123456789abcdef"
LOCK = f"  <metadata><mc:handoff xmlns:mc='{domainxml.NAMESPACE}' region='web' digest='{DIGEST}'/></metadata>\n"


@pytest.fixture
def made(tmp_path: Path) -> Tree:
    """A Debian with libvirt 9.0, as its packages leave it."""
    tree = Tree(tmp_path / "host")
    tree.write("/usr/sbin/libvirtd", "")
    tree.write("/usr/lib/systemd/system/libvirtd.service", "[Unit]\n")
    tree.write("/usr/lib/x86_64-linux-gnu/libvirt.so.0.9000.0", "")
    tree.directory("/etc/libvirt/hooks")
    tree.directory("/etc/systemd/system")
    tree.write(ABSTRACTION, "  #include <local/abstractions/libvirt-qemu>\n")
    tree.write(f"/{LOCAL}", "")
    return tree


def files(tree: Tree) -> dict[str, str]:
    return {str(each.relative_to(tree.root)): each.read_text() for each in tree.root.rglob("*") if each.is_file()}


def states(tree: Tree) -> dict[str, str]:
    return {part.id: part.state for part in libvirt_setup.status(tree.root)}


def set_up(tree: Tree) -> None:
    libvirt_setup.apply(libvirt_setup.setup(tree.root), tree.root)


def test_what_was_set_up_is_there_and_what_was_removed_has_left_nothing(made: Tree) -> None:
    before = files(made)
    directories = {path for path in made.root.rglob("*") if path.is_dir()}
    assert set(states(made).values()) == {"missing"}
    set_up(made)
    assert states(made) == {
        "hook": "there", "apparmor": "there", "order-libvirtd": "there", "order-resume": "there",
    }  # fmt: skip
    assert libvirt_setup.setup(made.root) == []
    assert os.access(made.root / HOOK, os.X_OK)
    libvirt_setup.apply(libvirt_setup.remove(made.root), made.root)
    assert files(made) == before
    assert {path for path in made.root.rglob("*") if path.is_dir()} == directories


def test_lines_of_others_around_memconsoles_stay(made: Tree) -> None:
    made.write(f"/{LOCAL}", "  /srv/** rw,")
    set_up(made)
    with (made.root / LOCAL).open("a") as file:
        file.write("  /opt/** r,\n")
    assert states(made)["apparmor"] == "there"
    libvirt_setup.apply(libvirt_setup.remove(made.root), made.root)
    assert (made.root / LOCAL).read_text() == "  /srv/** rw,\n  /opt/** r,\n"


def test_an_abstraction_with_a_directory_of_its_own_gets_a_file(made: Tree) -> None:
    made.write(ABSTRACTION, "  include if exists <abstractions/libvirt-qemu.d>\n")
    set_up(made)
    assert (made.root / f"{ABSTRACTION[1:]}.d/memconsole").is_file()
    assert (made.root / LOCAL).read_text() == ""


@pytest.mark.parametrize("path", [HOOK, LOCAL, ORDER])
def test_what_somebody_changed_is_left_alone_by_setup_and_remove(made: Tree, path: str) -> None:
    set_up(made)
    text = (made.root / path).read_text().replace("memconsole", "mine", 3).replace("RAM", "ram")
    (made.root / path).write_text(text.replace("mine; sha256", "memconsole; sha256"))
    changed = files(made)
    assert list(states(made).values()).count("altered") == 1
    for plan in (libvirt_setup.setup, libvirt_setup.remove):
        with pytest.raises(Refused) as refused:
            plan(made.root)
        assert refused.value.code == "Altered"
        assert path in refused.value.why
    assert files(made) == changed


def test_a_file_of_somebody_elses_and_a_mode_that_was_taken_away_are_altered(made: Tree) -> None:
    made.write(f"/{HOOK}", "#!/bin/sh\n")
    assert states(made)["hook"] == "altered"
    (made.root / HOOK).unlink()
    set_up(made)
    (made.root / HOOK).chmod(0o644)
    assert states(made)["hook"] == "altered"


def test_what_an_older_memconsole_wrote_is_stale_and_is_replaced(made: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as older:
        older.setattr(libvirt_setup, "_ORDER", "[Unit]\nAfter=old.service\n")
        older.setattr(libvirt_setup, "_RULES", "  /old rw,\n")
        set_up(made)
    assert {id for id, state in states(made).items() if state == "stale"} == {"apparmor", "order-libvirtd"}
    set_up(made)
    assert set(states(made).values()) == {"there"}
    assert "old" not in (made.root / LOCAL).read_text() + (made.root / ORDER).read_text()
    libvirt_setup.apply(libvirt_setup.remove(made.root), made.root)
    assert not (made.root / ORDER).parent.exists()


def test_a_file_that_changed_between_plan_and_change_is_not_overwritten(made: Tree) -> None:
    changes = libvirt_setup.setup(made.root)
    made.write(f"/{LOCAL}", "  /srv/** rw,\n")
    with pytest.raises(Refused, match="changed meanwhile"):
        libvirt_setup.apply(changes, made.root)
    assert (made.root / LOCAL).read_text() == "  /srv/** rw,\n"


def test_a_host_without_libvirt_and_one_that_is_too_old_are_refused_by_name(made: Tree, tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="no libvirt"):
        libvirt_setup.status(tmp_path)
    (made.root / "usr/lib/x86_64-linux-gnu/libvirt.so.0.9000.0").rename(made.root / "usr/lib/libvirt.so.0.6000.0")
    assert libvirt_host.version(made.root) == (6, 0, 0)
    assert states(made)["hook"] == "missing"
    with pytest.raises(Refused) as refused:
        libvirt_setup.setup(made.root)
    assert refused.value.code == "TooOld"


def test_a_link_that_leads_out_of_an_image_is_not_followed(made: Tree, tmp_path: Path) -> None:
    (made.root / "etc/libvirt/hooks").rmdir()
    (tmp_path / "elsewhere").mkdir()
    (made.root / "etc/libvirt/hooks").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(Refused) as refused:
        libvirt_setup.setup(made.root)
    assert refused.value.code == "OutsideOfRoot"


def test_a_daemon_that_runs_since_before_the_hook_is_to_be_restarted(made: Tree) -> None:
    ticks = os.sysconf("SC_CLK_TCK")
    set_up(made)
    made.write("/proc/uptime", "1000.00 1.00\n")
    made.link("/proc/self/ns/mnt", "mnt:[1]")
    for pid, name, since, space in ((7, "libvirtd", 10, 1), (8, "virtqemud", 2000, 1), (9, "libvirtd", 10, 2)):
        made.write(f"/proc/{pid}/comm", f"{name}\n")
        made.write(f"/proc/{pid}/stat", f"{pid} ({name}) S 1 {'0 ' * 17}{since * ticks} 0\n")
        made.link(f"/proc/{pid}/ns/mnt", f"mnt:[{space}]")
    assert [daemon.pid for daemon in libvirt_host.running(made.root)] == [7, 8]
    assert {id: state for id, state in states(made).items() if "daemon" in id} == {
        "daemon-libvirtd": "stale",
        "daemon-virtqemud": "there",
    }
    assert libvirt_setup.restarts(made.root) == ["systemctl restart libvirtd.service"]


@pytest.mark.parametrize(("value", "state"), [("0 0", Standing.MISSING), ("1 1", Standing.THERE)])
def test_selinux_is_looked_at_where_it_is(made: Tree, value: str, state: Standing) -> None:
    made.write("/sys/fs/selinux/booleans/virt_use_fusefs", value)
    (part,) = [part for part in libvirt_setup.status(made.root) if part.id == "selinux"]
    assert part.state is state
    assert ("setsebool" in part.remedy) is (state is Standing.MISSING)


def test_the_command_shows_a_diff_sets_up_says_how_it_stands_and_removes(
    made: Tree, capsys: pytest.CaptureFixture[str]
) -> None:
    where = ["--root", str(made.root)]
    assert main(["libvirt", "setup", "--dry-run", *where]) == 0
    said = capsys.readouterr().out
    assert f"+++ /{HOOK}" in said
    assert "+  /run/memconsole/guests/*/ram/* rw," in said
    assert main(["libvirt", "status", *where]) == 4
    assert main(["libvirt", "setup", "--yes", *where]) == 0
    assert f"wrote /{HOOK}" in capsys.readouterr().out
    assert main(["libvirt", "status", "--json", *where]) == 0
    assert {part["state"] for part in json.loads(capsys.readouterr().out)} == {"there"}
    assert main(["libvirt", "setup", "--yes", *where]) == 0
    assert "every part is there already" in capsys.readouterr().out
    assert main(["libvirt", "remove", "--yes", "--json", *where]) == 0
    assert len(json.loads(capsys.readouterr().out)["changes"]) == 4
    assert main(["libvirt", "status", *where]) == 4


# --- plans, and the hook that reads them ------------------------------------------------------------------------------


class Hooked:
    """The hook as libvirt calls it, with the directories of a host below ``root``."""

    def __init__(self, root: Path) -> None:
        self.runtime, self.backing = root / "run", root / "backing"
        self.directory = self.backing / "libvirt/qemu/7-web"
        self.directory.mkdir(parents=True)
        self.ram = root / "ram file"
        self.ram.write_bytes(b"")
        (root / "qemu.conf").write_text(f'# memory_backing_dir = "/x"\nmemory_backing_dir = "{self.backing}"\n')
        script = (Path(libvirt_setup.__file__).with_name("hook.sh")).read_text()
        script = script.replace("/run/memconsole/libvirt", str(plans.directory(self.runtime)))
        self.script = root / "hook"
        self.script.write_text(script.replace("/etc/libvirt/qemu.conf", str(root / "qemu.conf")))

    def __call__(self, operation: str, more: str = "") -> subprocess.CompletedProcess[str]:
        words = ["sh", str(self.script), "web", *operation.split(), "-"]
        return subprocess.run(words, input=XML.format(more), text=True, capture_output=True, check=False)

    def plan(self) -> None:
        plans.write(UUID, {"ram-node0": self.ram, "ram-node1": self.ram}, self.runtime)


@pytest.fixture
def hook(tmp_path: Path) -> Hooked:
    return Hooked(tmp_path)


def quiet(made: subprocess.CompletedProcess[str]) -> bool:
    return (made.returncode, made.stdout, made.stderr) == (0, "", "")


def test_a_domain_without_a_plan_is_left_alone_whatever_is_done_with_it(hook: Hooked) -> None:
    for _ in range(2):
        for operation in (
            "prepare begin",
            "start begin",
            "started begin",
            "stopped end",
            "release end",
            "migrate begin",
        ):
            assert quiet(hook(operation)), operation
        assert quiet(hook("restore begin", "  <description>&lt;mc:handoff/></description>\n"))
        plans.write(UUID.replace("c7", "d8"), {"pc.ram": hook.ram}, hook.runtime)
    assert not list(hook.directory.iterdir())


def test_every_block_of_a_plan_is_linked(hook: Hooked) -> None:
    hook.plan()
    assert quiet(hook("start begin"))
    assert {each.name: each.readlink() for each in hook.directory.iterdir()} == {
        "ram-node0": hook.ram,
        "ram-node1": hook.ram,
    }


def test_a_domain_that_boots_without_its_ram_is_started_all_the_same_and_linked_in_part_never(hook: Hooked) -> None:
    hook.plan()
    (hook.directory / "ram-node1").write_bytes(b"")
    boots = hook("start begin")
    assert boots.returncode == 0
    assert "starts on RAM that memconsole does not hold" in boots.stderr
    assert [each.name for each in hook.directory.iterdir()] == ["ram-node1"]
    hook.ram.unlink()
    assert hook("start begin").returncode == 0


def test_a_locked_image_is_refused_until_its_ram_was_verified_and_the_right_is_used_once(hook: Hooked) -> None:
    assert "is not here" in hook("restore begin", LOCK).stderr
    hook.plan()
    assert hook("restore begin", LOCK).returncode == 1
    plans.verified(UUID, DIGEST[::-1], hook.runtime)
    assert hook("restore begin", LOCK).returncode == 1
    plans.verified(UUID, DIGEST, hook.runtime)
    passed = hook("restore begin", LOCK)
    assert (passed.returncode, passed.stdout) == (0, XML.format("  <metadata></metadata>\n"))
    assert quiet(hook("start begin"))
    assert plans.is_verified(UUID, hook.runtime)
    assert quiet(hook("started begin"))
    assert not plans.is_verified(UUID, hook.runtime)
    assert hook("restore begin", LOCK).returncode == 1


def test_a_restore_that_failed_before_the_guest_ran_gives_the_right_back(hook: Hooked) -> None:
    hook.plan()
    plans.verified(UUID, DIGEST, hook.runtime)
    for _ in range(2):
        assert hook("restore begin", LOCK).returncode == 0
        assert quiet(hook("release end"))
    assert hook("restore begin", LOCK).returncode == 0
    hook.ram.unlink()
    refused = hook("start begin")
    assert (refused.returncode, "is not here" in refused.stderr) == (1, True)


def test_a_boot_on_the_ram_spends_the_right_of_an_image(hook: Hooked) -> None:
    hook.plan()
    plans.verified(UUID, DIGEST, hook.runtime)
    assert quiet(hook("start begin"))
    assert hook("restore begin", LOCK).returncode == 1


@pytest.mark.parametrize(
    "lock", ["<mc:handoff/>", "<mc:handoff digest=''/>", LOCK.replace("c:handoff x", "c:handoff\nx")]
)
def test_a_lock_that_cannot_be_read_is_locked(hook: Hooked, lock: str) -> None:
    hook.plan()
    plans.verified(UUID, DIGEST, hook.runtime)
    assert hook("restore begin", lock).returncode == 1


def test_a_plan_is_read_as_it_was_written_and_goes_as_a_whole(tmp_path: Path) -> None:
    runtime = tmp_path / "run"
    assert plans.planned(runtime) == ()
    with pytest.raises(NotFound):
        plans.verified(UUID, DIGEST, runtime)
    plans.write(UUID, {"pc.ram": Path("/a b/c")}, runtime)
    plans.verified(UUID, DIGEST, runtime)
    assert plans.read(UUID, runtime) == {"pc.ram": Path("/a b/c")}
    assert plans.planned(runtime) == (UUID,)
    plans.write(UUID, {"pc.ram": Path("/d")}, runtime)
    assert not plans.is_verified(UUID, runtime)
    plans.remove(UUID, runtime)
    assert list(plans.directory(runtime).iterdir()) == []


@pytest.mark.parametrize(
    ("uuid", "name", "path"), [("../x", "a", "/a"), (UUID, "a/b", "/a"), (UUID, "a", "/a\nram b /c")]
)
def test_what_the_hook_could_misread_is_not_written(tmp_path: Path, uuid: str, name: str, path: str) -> None:
    with pytest.raises(BadFile):
        plans.write(uuid, {name: Path(path)}, tmp_path / "run")


@pytest.mark.parametrize(
    ("names", "knows_no_acks"),
    [((), False), (("9006.0",), True), (("9007.0",), False), (("9000.0", "11003.0"), False), (("11003.0",), False)],
)
def test_a_libvirt_that_is_not_surely_too_old_may_know_what_qemu_can(
    tmp_path: Path, names: Sequence[str], knows_no_acks: bool
) -> None:
    place = tmp_path / "usr/lib/x86_64-linux-gnu"
    place.mkdir(parents=True)
    for name in names:
        (place / f"libvirt.so.0.{name}").touch()
    assert libvirt_host.knows_no_acks(tmp_path) is knows_no_acks
