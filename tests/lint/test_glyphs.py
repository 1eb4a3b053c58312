"""ASCII in place of glyphs: every one has a twin of as many cells, and signs that must differ still do."""

from __future__ import annotations

import ast
import io

import pytest
from rich.cells import cell_len
from support import sources

from memconsole.views import glyphs, looks
from memconsole.views.terminal import Outlet
from memconsole.views.widgets.pagegrid import LOOKS


def written() -> set[str]:
    """Every sign beyond ASCII that the views write."""
    found: set[str] = set()
    for path, node in sources.package(ast.Constant):
        if path.startswith("views/") and isinstance(node.value, str):
            found |= {sign for sign in node.value if ord(sign) > 127}
    return found - {'"'}


def test_every_sign_of_the_views_has_a_twin_of_its_own_choosing_or_of_its_kind() -> None:
    found = written()
    assert len(found) > 20
    assert {sign: glyphs.plain(sign) for sign in found if glyphs.plain(sign) in {"?", ""}} == {}


@pytest.mark.parametrize(
    "text", ["╭─╮│╰╯", "▔▁▎▊▌▐", "▁▂▃▄▅▆▇█", "Zoë Müller", "日本語", "e\u0301", "\x1b[1mplain", "→←"]
)
def test_a_twin_takes_as_many_cells(text: str) -> None:
    plain = glyphs.plain(text)
    assert plain.isascii()
    assert len(plain.replace("\x1b[1m", "")) == cell_len(text.replace("\x1b[1m", ""))


def test_the_signs_of_a_map_stay_apart() -> None:
    twins = [glyphs.plain(look.glyph) for look in LOOKS]
    assert len(twins) == len(set(twins))


def test_the_signs_of_states_stay_apart_where_no_word_stands_beside_them() -> None:
    for field in ("severity", "level"):
        twins = [glyphs.plain(look.glyph) for look in looks.words_of(field).values()]
        assert len(twins) == len(set(twins))


@pytest.mark.parametrize(
    ("setting", "term", "encoding", "ascii"),
    [
        ("", "linux", "utf-8", True),
        ("", "xterm-256color", "UTF-8", False),
        ("", "xterm-256color", "ANSI_X3.4-1968", True),
        ("unicode", "linux", "ascii", False),
        ("ascii", "xterm", "utf-8", True),
    ],
)
def test_who_gets_ascii(setting: str, term: str, encoding: str, ascii: bool) -> None:
    assert glyphs.only_ascii(setting, {"TERM": term}, encoding) is ascii


def test_what_is_written_to_such_a_terminal_is_ascii() -> None:
    file = io.StringIO()
    assert Outlet(file, only_ascii=True).write("╭ ✔ ready ▸") == 11
    assert file.getvalue() == "+ + ready >"
