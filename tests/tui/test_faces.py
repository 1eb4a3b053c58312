"""Nothing exists in one of the two faces alone: each view is a picture, text, a page to be heard and JSON."""

from __future__ import annotations

import argparse
import json

import pytest
from support.synthetic import SyntheticSource

from memconsole import actions, document, macros, pages
from memconsole.cli.parser import build
from memconsole.fields import TABLES
from memconsole.views.app import ConsoleApp
from memconsole.views.screens.detail import DETAILS
from memconsole.views.view import subject_of

VIEWS = [view.name for view in ConsoleApp.VIEWS]
ONLY_HEADLESS = {
    "demo": "opens a console",
    "open": "opens a console",
    "serve": "is the control process",
    "schema": "is for programs",
    "keys": "is the help of the console (?)",
    "macro": "is in the palette",
    "watch": "tells changes as they come, as the console does",
    "copy": "writes a region's contents to a file",
    "completion": "is for shells",
    "bridge": "carries bytes for another host",
    "each": "is what marked rows are in the console",
    "hosts": "is the console of many hosts",
    "libvirt": "sets up this machine",
}
"""Commands that are no view, no action and no report, and why."""


def test_every_view_and_every_subject_has_a_page() -> None:
    assert set(pages.PAGES) >= {*VIEWS, *DETAILS}


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("form", sorted(document.FORMATS))
def test_every_view_can_be_read_in_every_format(view: str, form: str) -> None:
    title, blocks = pages.of(SyntheticSource(), view)
    text = document.FORMATS[form](title, blocks)
    assert view in text
    if form == "json":
        assert json.loads(text)["title"] == view
    if form == "plain":
        assert not set(text) & set("│─┌┐└┘╭╮╰╯█▌\x1b\t|")
        assert "  " not in text.replace("\n  ", "\n"), "columns are no text to be heard"


@pytest.mark.parametrize("kind", sorted(set(DETAILS) - {"reach", "event"}))
def test_every_subject_can_be_read(kind: str) -> None:
    source = SyntheticSource()
    table = TABLES.get(f"{kind}s") or TABLES[kind]
    for item in list(table.rows(source.snapshot()))[:1]:
        subject = subject_of(table.id, item)
        title, blocks = pages.of(source, kind, subject)
        assert str(table.key(item)) in document.as_plain(title, blocks)


def test_every_action_is_in_both_faces_and_every_command_is_one_or_told_of() -> None:
    commands = next(each for each in build()._actions if isinstance(each, argparse._SubParsersAction)).choices
    acting = {cls.spec.words[0] for cls in actions.REGISTRY.values()}
    assert acting <= set(commands)
    assert set(commands) - acting - macros.LOOKING - set(ONLY_HEADLESS) == set()
