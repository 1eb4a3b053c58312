"""The command line: what it refuses before it talks to anyone, and what it must not import."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from memconsole.cli import main


@pytest.mark.parametrize(
    "words",
    [
        ["explode"],
        ["reserve", "web"],
        ["reserve", "web", "64Q"],
        ["reserve", "web", "--", "64M"],
        ["regions", "--fields", "name,colour", "--embedded"],
        ["snapshot", "--pfn"],
        ["snapshot", "--view", "regions"],
        ["pfn", "web", "--range", "zzz"],
        ["macro", "run", "x.toml", "--set", "novalue"],
        ["--interval", "0", "demo"],
    ],
    ids=" ".join,
)
def test_usage_errors_leave_with_two_and_a_sentence(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    said = capsys.readouterr()
    assert said.err.startswith("memconsole: ")
    assert "Traceback" not in said.err


@pytest.mark.parametrize("missing", ["stdin", "stdout", "stderr"])
def test_the_console_wants_a_terminal_before_it_begins_anything(missing: str) -> None:
    terminal, mine = pty.openpty()
    try:
        streams = dict.fromkeys(("stdin", "stdout", "stderr"), mine) | {missing: subprocess.DEVNULL}
        words = [Path(sys.executable).parent / "memconsole", "demo"]
        with subprocess.Popen(words, start_new_session=True, **streams) as process:
            assert process.wait(60) == 2
        if missing != "stderr":
            said = os.read(terminal, 9999).decode()
            assert f"the console wants a terminal: {missing} is not one" in said
            assert "guest" not in said
    finally:
        os.close(terminal)
        os.close(mine)


def test_acting_without_a_control_process_leaves_with_five(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--socket", str(tmp_path / "control"), "reserve", "web", "64M", "--json"]) == 5
    said = capsys.readouterr()
    assert json.loads(said.out)["error"]["code"] == "NoControl"
    assert "memconsole serve" in said.err


def test_a_file_that_is_no_snapshot_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x.json").write_text('{"format": "something.else"}')
    assert main(["diff", str(tmp_path / "x.json"), str(tmp_path / "x.json")]) == 1
    assert "x.json" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words", [["snapshot"], ["regions"], ["doctor"], ["reserve", "a", "4K", "--dry-run"]], ids=" ".join
)
def test_the_headless_twin_never_imports_the_console(words: list[str], tmp_path: Path) -> None:
    code = (
        "import sys; from memconsole.cli import main; "
        f"main(['--socket', {str(tmp_path / 'no')!r}, *{words!r}]); "
        "bad = sorted({'textual', 'rich', 'asyncio', 'qemu', 'psutil'} & set(sys.modules)); "
        "sys.exit(f'imported {bad}' if bad else 0)"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr


def test_a_reader_who_leaves_early_is_no_error() -> None:
    code = "from memconsole.cli import main; import sys; sys.exit(main(['schema']))"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        said = process.stderr.read()
        assert process.wait() == 0, said
        assert b"Broken" not in said
