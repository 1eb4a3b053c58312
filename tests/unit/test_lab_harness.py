"""The lab's harness, with programs that stand in for QEMU: what is run again and what is not; what runs at all."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from support import lab, lab_watch

TREE = Path(__file__).parents[2]
BOOTED = 'echo x >"$SHARE/booted"; '
END = """echo '{"name": "end", "ok": true, "stage": 1}' >>"$SHARE/verdicts"; """
BAD = """echo '{"name": "wrong", "ok": false, "stage": 1}' >>"$SHARE/verdicts"; """


@pytest.fixture
def share(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(lab, "repeated", [])
    monkeypatch.setattr(lab_watch, "LOOK_S", 0.02)
    # A stand-in is a shell that starts nothing while it counts: it runs, or waits for a processor, unless it sleeps.
    monkeypatch.setattr(lab_watch, "ASLEEP_S", 1.0)
    monkeypatch.setattr(lab_watch, "MOST", 200)
    monkeypatch.setenv("SHARE", str(tmp_path))
    return tmp_path


def ran(share: Path, monkeypatch: pytest.MonkeyPatch, *turns: str) -> lab.Verdicts:
    """A run whose QEMU does something else each time it is started."""
    count = share.with_name("count")
    script = f"read n <{count}; echo $((n + 1)) >{count}; case $n in "
    script += " ".join(f"{number}) {turn};;" for number, turn in enumerate(turns)) + " esac"
    monkeypatch.setattr(lab, "prepare", lambda *_, **__: ["sh", "-c", script])
    count.write_text("0\n")
    return lab.run("anything", share)


@pytest.mark.parametrize("crash", ["kill -SEGV $$", "exit 1", "true", "sleep 1000"])
def test_a_lab_that_does_not_come_to_its_userland_is_booted_again(
    share: Path, monkeypatch: pytest.MonkeyPatch, crash: str
) -> None:
    said = ran(share, monkeypatch, crash, crash, BOOTED + END)
    said.check()
    assert len(lab.repeated) == 2
    assert all(why in said.console for why in lab.repeated), "it is told, too"


@pytest.mark.parametrize("fault", ["kill -ABRT $$", "sleep 1000"])
def test_a_lab_whose_qemu_crashes_or_goes_deaf_is_run_again_from_the_start(
    share: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    half = """echo '{"name": "half", "ok": true, "stage": 1}' >>"$SHARE/verdicts"; """
    left = """mkdir "$SHARE/home" || exit; ln -s "$SHARE" "$SHARE/home/in"; """
    said = ran(share, monkeypatch, BOOTED + left + half + fault, BOOTED + left + END)
    said.check()
    assert [verdict["name"] for verdict in said.said] == ["end"]
    assert len(lab.repeated) == 1


def test_a_lab_whose_qemu_is_busy_with_nothing_is_run_again(share: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lab_watch, "ASLEEP_S", 1000.0)
    monkeypatch.setattr(lab_watch, "BUSY_S", 0.2)
    said = ran(share, monkeypatch, BOOTED + "while :; do :; done", BOOTED + END)
    said.check()
    assert lab_watch.DEAF in said.console


def test_a_lab_that_goes_deaf_again_and_again_fails(share: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = ran(share, monkeypatch, *[BOOTED + "sleep 1000"] * 5)
    with pytest.raises(AssertionError, match="never said 'end'"):
        said.check()
    assert len(lab.repeated) == lab.RUNS - 1
    assert lab_watch.DEAF in said.console


def test_what_went_wrong_in_the_lab_is_never_run_again(share: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = ran(share, monkeypatch, BOOTED + BAD + "kill -SEGV $$", BOOTED + END)
    with pytest.raises(AssertionError, match="wrong"):
        said.check()
    assert not lab.repeated


def test_a_run_that_ends_without_a_word_is_not_run_again(share: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = ran(share, monkeypatch, BOOTED, BOOTED + END)
    with pytest.raises(AssertionError, match="never said 'end'"):
        said.check()
    assert not lab.repeated


def test_a_scenario_that_stands_still_in_a_kernel_that_lives_fails(
    share: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lab_watch, "QUIET_S", 0.5)
    counts = 'while :; do n=$((n + 1)); echo $n >"$SHARE/alive"; sleep 0.05; done'
    said = ran(share, monkeypatch, BOOTED + counts, BOOTED + END)
    assert lab_watch.SILENT in said.console
    assert not lab.repeated


def test_a_qemu_that_is_busy_without_a_word_is_waited_for(share: Path) -> None:
    with subprocess.Popen(["sh", "-c", "while :; do :; done"]) as busy:
        watch = lab_watch.Watch(busy, share)
        assert watch._patience.left() > 0
        busy.kill()
        assert watch.ends() == ""
