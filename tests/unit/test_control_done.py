"""What is recorded as done is told as done, whatever becomes of the tidying behind it."""

from __future__ import annotations

import contextlib
import threading
from pathlib import Path

import pytest

from memconsole import actions as do
from memconsole.backend import control as control_module
from memconsole.backend.embedded import embedded
from memconsole.backend.ledger.log import Ledger
from memconsole.errors import KernelRefused
from memconsole.model import Finding, Snapshot

M = 1 << 20


def untidy(taken: Snapshot) -> list[Finding]:
    """What is said of the tidying; other VMs of this host have findings of their own."""
    return [finding for finding in taken.findings if finding.id == "tidying-failed"]


def full(*_: object) -> None:
    raise KernelRefused("fallocate of the ledger", 12, code="LedgerFull")


def unforeseen(*_: object) -> None:
    raise KeyError("nobody thought of this")


@pytest.mark.parametrize("fails", [full, unforeseen])
def test_an_action_is_done_though_the_ledger_cannot_be_tidied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: object
) -> None:
    with contextlib.closing(embedded(tmp_path / "run")) as control:
        with monkeypatch.context() as patched:
            patched.setattr(Ledger, "worth_compacting", True)
            patched.setattr(Ledger, "compact", fails)
            assert control.apply(do.Reserve("web", M)).text == "region web is reserved: 1M"
        taken = control.snapshot()
        assert [region.name for region in taken.regions] == ["web"]
        assert [(event.kind, event.text) for event in taken.events] == [("reserve", "region web is reserved: 1M")]
        (finding,) = untidy(taken)
        assert finding.subject == "the ledger"
        assert "the action is done" in finding.observed
        control.apply(do.Release("web"))
        assert untidy(control.snapshot()) == []


@pytest.mark.parametrize("fails", [full, unforeseen])
def test_an_action_is_done_though_what_is_due_behind_it_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: object
) -> None:
    with contextlib.closing(embedded(tmp_path / "run")) as control:
        work = control._prepare

        def with_after(action: do.Action) -> object:
            made = work(action)
            made.after = fails  # type: ignore[assignment]
            made.then = [do.Release("nothing-of-the-kind")]
            return made

        with monkeypatch.context() as patched:
            patched.setattr(control, "_prepare", with_after)
            patched.setattr(control_module.Control, "_bring_back", lambda *_: None)
            assert control.apply(do.Reserve("web", M)).text == "region web is reserved: 1M"
        assert len(untidy(control.snapshot())) == 1
        assert control.plan(do.Release("web")).refusals == ()


def test_what_is_asked_once_sees_to_nothing_of_itself(tmp_path: Path) -> None:
    def jobs() -> set[str]:
        return {thread.name for thread in threading.enumerate() if thread not in before}

    before = set(threading.enumerate())
    with contextlib.closing(embedded(tmp_path / "brief", brief=True)) as control:
        assert control.snapshot().regions == ()
        assert "memconsole-domains" not in jobs()
    with contextlib.closing(embedded(tmp_path / "lasting")):
        assert "memconsole-domains" in jobs()
