"""Paths that a viewer names: only below the directories of kernels, and nothing is told of any other file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from msgspec.structs import replace

from memconsole import action_input, actions
from memconsole.actions import GuestStart, HandoffRehearse, HandoffRun, Reserve
from memconsole.backend.wire import named
from memconsole.errors import Denied, UsageError


@pytest.fixture
def boot(tmp_path: Path) -> Path:
    boot = tmp_path / "boot"
    boot.mkdir()
    (boot / "vmlinuz-7").write_bytes(b"kernel")
    (boot / "vmlinuz").symlink_to("vmlinuz-7")
    (tmp_path / "secret").write_bytes(b"secret")
    (boot / "out").symlink_to(tmp_path / "secret")
    (boot / "away").symlink_to(tmp_path / "none")
    (tmp_path / "alias").symlink_to(boot)
    return boot


@pytest.mark.parametrize("name", ["vmlinuz-7", "vmlinuz", "none", "deeper/none"])
def test_what_is_there_may_be_named(boot: Path, name: str) -> None:
    named.check(HandoffRun(kernel=f"{boot}/{name}", initrd=f"{boot}/none"), (str(boot),))
    named.check(HandoffRehearse(), (str(boot),))
    named.check(Reserve("web", 1 << 20), (str(boot),))
    named.check(HandoffRun(kernel=f"{boot.parent}/alias/{name}"), (f"{boot.parent}/alias",))


@pytest.mark.parametrize(
    "name",
    ["../secret", "../none", "out", "away", "vmlinuz-7/../../secret", ".."],
)
@pytest.mark.parametrize("field", ["kernel", "initrd"])
def test_what_is_elsewhere_may_not_and_its_being_there_is_not_told(boot: Path, field: str, name: str) -> None:
    with pytest.raises(Denied) as refused:
        named.check(replace(HandoffRun(), **{field: f"{boot}/{name}"}), (str(boot),))
    assert str(refused.value).replace(f"{boot}/{name}", "X") == (
        f"viewers cannot name X: viewers may name files below {boot} (name an image there, or ask an operator)"
    )


@pytest.mark.parametrize("path", ["{}/secret", "{}/boots/x", "boot/vmlinuz", "/proc/self/mem", "{}/alias/vmlinuz-7"])
def test_a_name_is_judged_before_anything_is_looked_for(boot: Path, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[str] = []

    def leads_below(path: str, _: object) -> bool:
        looked.append(path)
        return False

    monkeypatch.setattr(named, "_leads_below", leads_below)
    with pytest.raises(Denied):
        named.check(HandoffRun(kernel=path.format(boot.parent)), (str(boot),))
    assert looked == []


@pytest.mark.parametrize(
    "make",
    [
        lambda: GuestStart("vm", device="../../../etc/shadow"),
        lambda: GuestStart("vm", device="0000:00:04.0\n"),
        lambda: GuestStart("vm", args=("-drive", "file=a\0b")),
        lambda: HandoffRun(kernel="/boot/a\0b"),
        lambda: HandoffRun(append="quiet\0"),
    ],
)
def test_text_that_would_name_another_file_is_no_action(make: Callable[[], actions.Action]) -> None:
    with pytest.raises(UsageError):
        action_input.decode(action_input.encode(make()))
