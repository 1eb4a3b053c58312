"""Kernel command lines are read as the kernel reads them, this one's and the next one's alike."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.trees import Tree

from memconsole.backend.kernel import cmdline, kho
from memconsole.backend.kernel.cmdline import BootParameter, parse, switched_on


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("", []),
        (" \t\n\v\f\r ", []),
        ("quiet kho=on", [("quiet", None), ("kho", "on")]),
        ('dyndbg="file drivers/vfio/* +p" kho=on', [("dyndbg", "file drivers/vfio/* +p"), ("kho", "on")]),
        ('"kho=on" x', [("kho", "on"), ("x", None)]),
        ('"a b=c d" x', [("a b", "c d"), ("x", None)]),
        ('"a="b c"" x', [("a", "b"), ('c""', None), ("x", None)]),
        ('a=b"c d"e f', [("a", 'b"c d"e'), ("f", None)]),
        ('a="never closed kho=on', [("a", "never closed kho=on")]),
        ('a=" b', [("a", " b")]),
        ('a="', [("a", "")]),
        ('"', [("", None)]),
        ("a= b==c =d=e", [("a", ""), ("b", "=c"), ("=d", "e")]),
        ("vfio-pci.ids=1:2 no-hlt", [("vfio_pci.ids", "1:2"), ("no_hlt", None)]),
        ("a -- b", [("a", None)]),
        ('a "--" b', [("a", None)]),
        ("a -- kho=off", [("a", None)]),
        ("a --b -- c", [("a", None), ("__b", None)]),
        (b"a\xa0b \xff=1", [("a", None), ("b", None), ("\\xff", "1")]),
        ('x="a -- b" kho=on', [("x", "a -- b"), ("kho", "on")]),
    ],
)
def test_words_are_those_of_next_arg(line: str | bytes, words: list[tuple[str, str | None]]) -> None:
    assert [tuple(word) for word in parse(line)] == words


@pytest.mark.parametrize(
    ("line", "on"),
    [
        ("", None),
        ("kho", None),
        ("kho=", None),
        *((f"kho={word}", True) for word in ("on", "ON", "oN", "1", "y", "Yes", "true", "T", "onwards", "10")),
        *((f"kho={word}", False) for word in ("off", "OFF", "0", "n", "No", "false", "F", "of")),
        *((f"kho={word}", None) for word in ("o", "maybe", "2", "-1", " on")),
        ("kho=on kho=off", False),
        ("kho=off kho=on", True),
        ("kho=on kho=maybe kho", True),
        ("KHO=on", None),
        ("kho=on -- kho=off", True),
    ],
)
def test_a_switch_is_what_kstrtobool_makes_of_the_last_word_it_understands(line: str, on: bool | None) -> None:
    assert switched_on(parse(line), "kho") is on


@pytest.mark.parametrize(
    ("line", "on"),
    [
        ('dyndbg="file drivers/vfio/* +p" kho=on liveupdate=on', True),
        ('"kho=on" liveupdate="on"', True),
        ('systemd.setenv="NOTE=was kho=on liveupdate=on before"', False),
        ('kho=on liveupdate=on dyndbg="module kho +p; kho=off -- x"', True),
        ("kho=ON liveupdate=Yes", True),
        ("kho=on liveupdate=on -- kho=off", True),
    ],
)
def test_what_this_kernel_was_booted_with_is_read_the_same_way(tmp_path: Path, line: str, on: bool) -> None:
    made = Tree(tmp_path)
    made.host(command_line=line)
    found = kho.survival(made.root)
    assert (found.kho_cmdline, found.luo_cmdline) == (on, on)


def test_a_word_is_written_so_that_it_is_read_again() -> None:
    for word in (BootParameter("quiet"), BootParameter("memmap", "512M!4G"), BootParameter("dyndbg", "file a +p")):
        assert parse(str(word)) == (word,)


@given(st.one_of(st.binary(max_size=80), st.text('ab="- \\t', max_size=40)))
def test_every_line_has_words(line: bytes | str) -> None:
    for word in cmdline.parse(line):
        assert word != ("--", None)
        switched_on([word], word.name)


@pytest.mark.parametrize(
    ("line", "ranges"),
    [
        ("memmap=256M!1G", [(256 << 20, "!", 1 << 30)]),
        ("memmap=0x10000000!0x40000000", [(256 << 20, "!", 1 << 30)]),
        ("memmap=262144k!1024M", [(256 << 20, "!", 1 << 30)]),
        ("memmap=010M!1g", [(8 << 20, "!", 1 << 30)]),
        ("memmap=0x1e!0xE", [(0x1E, "!", 0xE)]),
        ("memmap=1M$2M,4M#5M memmap=exactmap memmap=many!1G,6M@7M", [(1, "$", 2), (4, "#", 5), (6, "@", 7)]),
        ("quiet -- memmap=1G!2G", []),
        ("memmap", []),
    ],
)
def test_ranges_of_memmap_are_read_as_the_kernel_does(line: str, ranges: list[tuple[int, str, int]]) -> None:
    scale = 1 << 20 if "many" in line else 1
    found = [each.meaning for each in cmdline.memmaps(cmdline.parse(line))]
    assert found == [(size * scale, mark, start * scale) for size, mark, start in ranges]
