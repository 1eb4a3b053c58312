"""Pages as HTML, Markdown, plain text and JSON; an audit's report and a bug report."""

from __future__ import annotations

import json
import os
import re
import tarfile
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest
from support.synthetic import SyntheticSource

from memconsole import document, pages, paths, recording, report
from memconsole.cli import main
from memconsole.document import Heading, Paragraph, Picture, Rows
from memconsole.errors import NotFound, UsageError
from memconsole.field import Field

HOSTILE = "<script>alert(1)</script> | `x` \x1b]0;pwn\x07\u202e"
NAME = Field("name", "Name", "its name", lambda row: row["name"])
SIZE = Field("size", "Size", "its size", lambda row: row["size"], lambda value: f"{value}M", right=True)
BLOCKS = (
    Heading("Regions", 1),
    Paragraph(("two lines", HOSTILE)),
    Rows("Region", (NAME, SIZE), ({"name": "web", "size": 64}, {"name": HOSTILE, "size": 1})),
    Picture('<svg xmlns="http://www.w3.org/2000/svg"/>', "half of it is huge"),
)


def test_a_page_to_be_heard_has_a_fact_a_line() -> None:
    assert document.as_plain("t", BLOCKS[2:3]).splitlines()[:2] == ["Region web.", "  Size: 64M."]
    assert document.as_plain("t", [Rows("Region", (NAME,), ())]) == "No region.\n"
    assert document.as_plain("t", BLOCKS).splitlines()[-1] == "half of it is huge"


@pytest.mark.parametrize("form", sorted(document.FORMATS))
def test_texts_of_others_are_text_in_every_format(form: str) -> None:
    text = document.FORMATS[form]("t", BLOCKS)
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e]", text)
    if form in {"html", "markdown"}:
        assert "<script>" not in text
    if form == "markdown":
        assert len({line.count("|") - line.count(r"\|") for line in text.splitlines() if line.startswith("| ")}) == 1


def test_json_has_values_as_they_are_measured() -> None:
    found = json.loads(document.as_json("t", BLOCKS))
    assert found["blocks"][2]["rows"][0] == {"name": "web", "size": 64}


class Loads(HTMLParser):
    """What a page would load, and whether its elements are closed."""

    def __init__(self) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.loaded += [f"{tag} {name}={value}" for name, value in attrs if name in {"src", "href", "style"}]
        if tag not in {"meta", "br"}:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_report_of_an_audit_is_one_page_that_loads_nothing() -> None:
    source = SyntheticSource()
    title, blocks = report.of(source, source.snapshot())
    text = document.as_html(title, blocks)
    found = Loads()
    found.feed(text)
    assert (found.loaded, found.open) == ([], [])
    assert "url(" not in text
    assert "@import" not in text
    for heading in (
        "Findings",
        "Conditions of a handoff",
        "The last handoff",
        "Guests",
        "Regions",
        "Maps",
        "Last events",
    ):
        assert f"<h2>{heading}</h2>" in text
    for picture in re.findall(r"<svg.*?</svg>", text, re.DOTALL):
        ET.fromstring(picture)
    assert text.count("<svg") >= len(source.snapshot().regions)


def test_a_map_says_in_a_sentence_what_its_picture_shows() -> None:
    source = SyntheticSource()
    (picture,) = pages.map_of(source, "region:spare6")
    assert isinstance(picture, Picture)
    assert re.match(r"region:spare6: \S+ in \d+ runs: .*(present|absent|huge)", picture.text)
    widths = [float(each.get("width", "0")) for each in ET.fromstring(picture.svg).iter() if each.tag.endswith("rect")]
    assert sum(widths) == pytest.approx(960, abs=1)


def test_what_there_is_not_is_named() -> None:
    with pytest.raises(UsageError, match="no view 'nowhere'"):
        pages.of(SyntheticSource(), "nowhere")
    with pytest.raises(NotFound, match="no region 'nothing'"):
        pages.of(SyntheticSource(), "region", "region:nothing")


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str]:
    code = main(["--embedded", *words])
    return code, capsys.readouterr().out


def test_views_and_reports_are_written_by_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, text = run(capsys, "snapshot", "--view", "regions", "--plain")
    assert (code, text.splitlines()[0]) == (0, "regions.")
    code, text = run(capsys, "snapshot", "--view", "audit", "--format", "json")
    assert (code, json.loads(text)["title"]) == (0, "audit")
    recorded = str(tmp_path / "a.snap")  # what this host runs is not waited for
    recording.write(tmp_path / "a.snap", SyntheticSource().snapshot())
    for name, begins in (("a.html", "<!DOCTYPE html>"), ("a.md", "# Memory audit of"), ("a.txt", "Memory audit of")):
        assert run(capsys, "report", "--from", recorded, "-o", str(tmp_path / name))[0] == 0
        assert (tmp_path / name).read_text().startswith(begins)
    assert run(capsys, "report", "-o", str(tmp_path / "a.pdf"))[0] == 2
    assert run(capsys, "regions", "--plain") == (0, "No name.\n")


def test_a_bug_report_is_one_archive_that_only_its_user_reads(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "bug.tar.gz"
    monkeypatch.setattr(paths, "state_dir", lambda: tmp_path)
    (tmp_path / "serve.log").write_bytes(f"{os.uname().nodename} has /home/x/vm.img \xff\n".encode("latin-1"))
    code, _ = run(capsys, "bugreport", "-o", str(path))
    assert code == 0
    assert path.stat().st_mode & 0o777 == 0o600
    with tarfile.open(path) as archive:
        names = {Path(name).name for name in archive.getnames()}
        snapshot: Any = json.load(archive.extractfile("memconsole-bugreport/snapshot.json") or pytest.fail("none"))
        log = (archive.extractfile("memconsole-bugreport/logs/serve.log") or pytest.fail("none")).read().decode()
    assert re.fullmatch(rf"{snapshot['host']['name']} has path-\d+ \\xff\n", log)
    assert {"versions.json", "snapshot.json", "conditions.json", "doctor.json"} <= names
    assert snapshot["host"]["name"].startswith("host-")
    assert run(capsys, "bugreport", "-o", str(path))[0] == 1
