"""The command line: what it refuses before it talks to anyone, and what it must not import."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from support.waiting import LONG_S

from memconsole import actions as do
from memconsole import command
from memconsole.cli import main
from memconsole.cli.parser import parse
from memconsole.errors import ExitCode


@pytest.mark.parametrize(
    "words",
    [
        ["explode"],
        ["reserve", "web"],
        ["reserve", "web", "64Q"],
        ["reserve", "--", "web", "64M", "--node", "1"],
        ["regions", "--columns", "name,colour", "--embedded"],
        ["regions", "--where", "colour:red", "--embedded"],
        ["snapshot", "--pfn"],
        ["snapshot", "--view", "nowhere"],
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


@pytest.mark.parametrize("more", [[], ["--json"], ["--where", "severity=error"]])
def test_a_command_that_is_gone_names_the_one_that_took_its_place(
    more: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["findings", *more]) == 2
    assert "memconsole audit" in capsys.readouterr().err
    assert parse(["audit", *more]).table == "findings"


def test_a_host_is_recorded_and_read_elsewhere(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = tmp_path / "here" / "host"
    assert main(["doctor", "--record", str(place)]) == 0
    said = capsys.readouterr()
    assert str(place) in said.out
    assert "before you send it" in said.err
    assert place.stat().st_mode & 0o777 == 0o700
    mine = place / "proc" / str(os.getpid())
    assert (mine / "cmdline").read_bytes() == Path("/proc/self/cmdline").read_bytes()
    assert not list(place.glob("proc/*/environ"))
    assert not list(place.glob("proc/*/mem"))
    assert main(["doctor", "--from", str(place), "--json"]) == 0
    found = {each["id"]: each["level"] for each in json.loads(capsys.readouterr().out)}
    assert found
    assert set(found.values()) <= {"yes", "partly", "no"}
    assert main(["doctor", "--record", str(place)]) == 2
    assert "is not empty" in capsys.readouterr().err
    assert main(["doctor", "--from", str(tmp_path)]) == 2
    assert "no recorded host" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert main(["doctor", "--record", str(tmp_path / "file" / "host")]) == 1


@pytest.mark.parametrize("missing", ["stdin", "stdout", "stderr"])
def test_the_console_wants_a_terminal_before_it_begins_anything(missing: str) -> None:
    terminal, mine = pty.openpty()
    try:
        streams = dict.fromkeys(("stdin", "stdout", "stderr"), mine) | {missing: subprocess.DEVNULL}
        words = [str(Path(sys.executable).parent / "memconsole"), "demo"]
        with subprocess.Popen(
            words,
            start_new_session=True,
            stdin=streams["stdin"],
            stdout=streams["stdout"],
            stderr=streams["stderr"],
        ) as process:
            assert process.wait(LONG_S) == 2
        if missing != "stderr":
            said = os.read(terminal, 9999).decode()
            assert f"the console needs a terminal: {missing} is not one" in said
            assert "guest" not in said
    finally:
        os.close(terminal)
        os.close(mine)


def test_acting_without_a_control_process_leaves_with_five(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--socket", str(tmp_path / "control"), "reserve", "web", "64M", "--json"]) == 5
    said = capsys.readouterr()
    assert json.loads(said.out)["error"]["code"] == "NoControl"
    assert "memconsole serve" in said.err


MACRO = """
title = "one"

[[step]]
do = "reserve"
name = "web"
size = "4M"
"""


@pytest.mark.parametrize(
    "words", [["reserve", "web", "4M"], ["guest", "start", "c"], ["macro", "run", "MACRO", "--yes"]]
)
def test_what_would_end_with_its_command_is_not_done(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "one.toml").write_text(MACRO)
    words = [str(tmp_path / "one.toml") if word == "MACRO" else word for word in words]
    assert main(["--embedded", *words, "--json"]) == 3
    said = capsys.readouterr()
    assert json.loads(said.out)["error"]["code"] == "NotKept"
    assert "memconsole serve" in said.err
    assert main(["--embedded", *words, "--dry-run"]) == 0
    assert "kept" not in capsys.readouterr().out


def test_a_file_that_is_no_snapshot_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x.json").write_text('{"format": "something.else"}')
    assert main(["diff", str(tmp_path / "x.json"), str(tmp_path / "x.json")]) == 1
    assert "x.json" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words", [["snapshot"], ["regions"], ["guests"], ["doctor"], ["reserve", "a", "4K", "--dry-run"]], ids=" ".join
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


def test_two_dashes_end_the_options_and_only_guest_start_hands_words_on() -> None:
    plain = command.parse(["reserve", "web", "4K", "--node", "1"])
    assert command.parse(["reserve", "--node", "1", "--", "web", "4K"]) == plain
    assert command.parse(["reserve", "--", "-web", "4K"]) == do.Reserve("-web", 4096)
    start = command.parse(["guest", "start", "vm", "--vmm", "qemu", "--", "-smp", "2", "--", "x"])
    assert isinstance(start, do.GuestStart)
    assert start.args == ("-smp", "2", "--", "x")
    assert command.parse(["guest", "stop", "--", "vm"]) == do.GuestStop("vm")
    assert parse(["--embedded", "reserve", "--dry-run", "--", "web", "4K"]).name == "web"
    assert parse(["inspect", "--json", "--", "--file"]).file == "--file"
    assert parse(["guest", "start", "vm", "--", "-m", "1G"]).rest == ("-m", "1G")


def test_a_thread_is_no_process_to_attach(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ready, over = threading.Event(), threading.Event()

    def wait() -> None:
        ready.set()
        over.wait()

    thread = threading.Thread(target=wait)
    thread.start()
    ready.wait()
    try:
        words = ["guest", "attach", "x", "--pid", str(thread.native_id), "--dry-run"]
        assert main(["--socket", str(tmp_path / "no"), "--embedded", *words]) == ExitCode.REFUSED
    finally:
        over.set()
        thread.join()
    assert f"is a thread of process {os.getpid()}" in capsys.readouterr().out


def test_a_dry_run_of_a_macro_says_by_its_exit_code_that_it_would_be_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.toml"
    for name, code in (("web", ExitCode.DONE), ("no/name", ExitCode.REFUSED)):
        path.write_text(f"[[step]]\ndo = 'reserve'\nname = '{name}'\nsize = '4K'\n")
        words = ["macro", "run", str(path), "--dry-run"]
        assert main(["--socket", str(tmp_path / "no"), "--embedded", *words]) == code
