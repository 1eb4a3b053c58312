"""What a shell is told may come next, and the manual page: both of the parser, so neither lacks a command."""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from memconsole.cli import shelldocs
from memconsole.cli.parser import build

MEMCONSOLE = "import sys; from memconsole.cli import main; sys.exit(main())"


def asked(line: str) -> list[str]:
    """What a shell would be offered after this line."""
    script = f'exec 8>&1 9>/dev/null 1>/dev/null 2>&1; exec "{sys.executable}" -c "{MEMCONSOLE}"'
    told = {
        "_ARGCOMPLETE": "1",
        "_ARGCOMPLETE_IFS": "\n",
        "_ARGCOMPLETE_SHELL": "bash",
        "_ARGCOMPLETE_SUPPRESS_SPACE": "1",
    }
    words = {"COMP_LINE": line, "COMP_POINT": str(len(line)), "COMP_TYPE": "9"}
    env = {**os.environ, **told, **words}
    ended = subprocess.run(["bash", "-c", script], env=env, capture_output=True, text=True, check=True)
    return sorted(ended.stdout.splitlines())


def test_commands_options_choices_and_macros_are_completed() -> None:
    assert asked("memconsole gu") == ["guest", "guests"]
    assert asked("memconsole reserve web 64M --pag") == ["--page-size"]
    assert asked("memconsole reserve web 64M --page-size ") == ["1G", "2M", "4K"]
    assert asked("memconsole macro run nightly") == ["nightly-audit"]


def test_a_name_that_there_is_not_is_not_taken_for_a_file() -> None:
    offered = asked("memconsole --socket /nowhere/control release ")
    assert [each for each in offered if not each.startswith("-")] == []


@pytest.mark.parametrize("shell", sorted(shelldocs.COMPLETIONS))
def test_the_script_of_a_shell_is_one_that_it_reads(shell: str, tmp_path: Path) -> None:
    script = tmp_path / shell
    script.write_text(shelldocs.completion(shell))
    assert "memconsole" in script.read_text()
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    subprocess.run([shell, "-n", script], check=True)


def commands(parser: argparse.ArgumentParser, words: tuple[str, ...] = ()) -> list[str]:
    found = [" ".join(words)]
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for word, sub in action.choices.items():
                found += commands(sub, (*words, word))
    return found


def test_the_manual_page_has_every_command_and_is_the_same_each_time() -> None:
    page = shelldocs.man_page()
    plain = page.replace("\\", "")
    assert [each for each in commands(build()) if f"memconsole {each}".strip() not in plain] == []
    assert page == shelldocs.man_page()
    assert "option_strings" not in page, "a percent sign in a help text is written twice"
    assert page.startswith(".TH MEMCONSOLE 1")


@pytest.mark.skipif(shutil.which("man") is None, reason="man is not installed")
def test_the_manual_page_is_one(tmp_path: Path) -> None:
    path = tmp_path / "memconsole.1"
    path.write_text(shelldocs.man_page())
    words = ["man", "--warnings=mac", "-E", "UTF-8", "-l", "-Tutf8", "-Z", str(path)]
    ended = subprocess.run(words, capture_output=True, text=True, check=False, env={**os.environ, "MANWIDTH": "80"})
    assert ended.returncode == 0
    assert "macro" not in ended.stderr, ended.stderr
