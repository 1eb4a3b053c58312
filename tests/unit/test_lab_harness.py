"""The lab's harness, with programs that stand in for QEMU: what is run again and what is not; what runs at all."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support import lab, lab_python, lab_watch

TREE = Path(__file__).parents[2]
BOOTED = 'echo x >"$SHARE/booted"; '
END = """echo '{"name": "end", "ok": true, "stage": 1}' >>"$SHARE/verdicts"; """
BAD = """echo '{"name": "wrong", "ok": false, "stage": 1}' >>"$SHARE/verdicts"; """


@pytest.fixture
def share(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(lab, "repeated", [])
    monkeypatch.setattr(lab_watch, "LOOK_S", 0.02)
    monkeypatch.setattr(lab_watch, "ASLEEP_S", 0.5)
    monkeypatch.setenv("SHARE", str(tmp_path))
    return tmp_path


def ran(share: Path, monkeypatch: pytest.MonkeyPatch, *turns: str) -> lab.Verdicts:
    """A run whose QEMU does something else each time it is started."""
    count = share.with_name("count")
    script = f"n=$(cat {count} 2>/dev/null || echo 0); echo $((n + 1)) >{count}; case $n in "
    script += " ".join(f"{number}) {turn};;" for number, turn in enumerate(turns)) + " esac"
    monkeypatch.setattr(lab, "prepare", lambda *_, **__: ["sh", "-c", script])
    count.unlink(missing_ok=True)
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


# --- what runs


def collected(**more: str) -> list[str]:
    """The tests of the tier, in the order in which they run."""
    command = [sys.executable, "-m", "pytest", "-q", "--collect-only", "-p", "no:cacheprovider", "tests/vm"]
    done = subprocess.run(command, cwd=TREE, env=os.environ | more, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "deselected" not in done.stdout
    return [line for line in done.stdout.splitlines() if "::" in line]


def test_every_test_of_the_tier_runs_whatever_the_day_and_the_environment() -> None:
    tests = collected()
    assert collected(MEMCONSOLE_SOAK="1", TZ="Pacific/Kiritimati", PYTHONHASHSEED="7") == tests
    names = {name for path in TREE.glob("tests/vm/test_*.py") for name in functions(path)}
    assert {line.split("::")[1].split("[")[0] for line in tests} == names


def functions(path: Path) -> list[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return [node.name for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")]


def groups(path: Path) -> set[str]:
    """Every group that a file of tests names."""
    calls = [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]
    marks = [call for call in calls if isinstance(call.func, ast.Attribute) and call.func.attr == "group"]
    return {str(ast.literal_eval(call.args[0])) for call in marks}


def test_the_groups_are_those_whose_time_is_known() -> None:
    source = ast.parse((TREE / "tests" / "vm" / "conftest.py").read_text(encoding="utf-8"))
    known = next(
        ast.literal_eval(node.value)
        for node in source.body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id == "SECONDS"
    )
    named = set().union(*(groups(path) for path in TREE.glob("tests/vm/test_*.py")))
    assert named <= set(known)
    unmarked = {path.stem.removeprefix("test_").replace("_", "-") for path in TREE.glob("tests/vm/test_*.py")}
    assert set(known) <= named | unmarked


READS_THE_DATE = {"gmtime", "localtime", "today", "now", "strftime", "utcnow"}


def test_nothing_of_the_lab_asks_what_day_it_is() -> None:
    for path in [*TREE.glob("tests/vm/**/*.py"), *TREE.glob("tests/support/lab*.py"), TREE / "tools/run_tests.py"]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and node.attr in READS_THE_DATE:
                raise AssertionError(f"{path}:{node.lineno}: {node.attr}")
            if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mod | ast.FloorDiv):
                assert "time.time" not in ast.unparse(node), f"{path}:{node.lineno}"


# --- what a scenario imports


def imported(path: Path) -> set[str]:
    """The modules that a file imports when it is imported, and those that files of tests/support import for it."""
    found: set[str] = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import):
            found |= {each.name for each in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module == "support":
            found |= {f"support.{each.name}" for each in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(str(node.module))
    shared = [TREE / "tests" / f"{name.replace('.', '/')}.py" for name in found if name.startswith("support.")]
    return found.union(*(imported(each) for each in shared))


@pytest.mark.parametrize("path", sorted(TREE.glob("tests/vm/scenarios/*.py")), ids=lambda path: path.stem)
def test_a_scenario_imports_nothing_that_the_labs_python_lacks(path: Path) -> None:
    assert not {name.partition(".")[0] for name in imported(path)} & set(lab_python.LEFT_OUT)
