"""Metrics: text that follows the OpenMetrics grammar, over a socket and in a file."""

from __future__ import annotations

import itertools
import os
import re
import shutil
import socket
import subprocess
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import msgspec
import pytest
from msgspec.structs import replace
from support.served import ServedSource
from support.synthetic import snapshot, with_usage
from support.waiting import LONG_S, until

from memconsole.backend.wire import metrics, sockets
from memconsole.backend.wire.serving import RunningService, serve_in_thread
from memconsole.errors import KernelRefused
from memconsole.model import Condition, GuestState, Readiness, Severity, Snapshot

# exposition = *family "# EOF\n"; family = TYPE [UNIT] HELP 1*sample, all of one name, and no name twice.
HEAD = re.compile(r"# TYPE (?P<name>[a-z_]+) (?P<kind>gauge|counter|info)")
LABEL = r'[a-z_]+="(?:[^"\\\n]|\\\\|\\"|\\n)*"'
SAMPLE = re.compile(rf"(?P<name>[a-z_]+)(?:\{{(?P<labels>{LABEL}(?:,{LABEL})*)\}})? (?P<value>-?[0-9.]+(?:e[+-]?\d+)?)")
DOCUMENT = Path(__file__).parents[2] / "docs" / "service.md"
SUFFIX = {"gauge": "", "counter": "_total", "info": "_info"}


def parse(text: str) -> dict[str, dict[str, float]]:
    """The samples of every family by their labels; an assertion fails where the text breaks the grammar."""
    *lines, last = text.splitlines()
    assert last == "# EOF"
    assert text.endswith("# EOF\n")
    families: dict[str, dict[str, float]] = {}
    at = 0
    while at < len(lines):
        head = HEAD.fullmatch(lines[at])
        assert head is not None, lines[at]
        name = head["name"]
        assert name not in families
        families[name] = {}
        at += 1
        if lines[at].startswith("# UNIT"):
            unit = lines[at].removeprefix(f"# UNIT {name} ")
            assert name.endswith(f"_{unit}")
            at += 1
        assert lines[at].startswith(f"# HELP {name} ")
        at += 1
        while at < len(lines) and not lines[at].startswith("#"):
            sample = SAMPLE.fullmatch(lines[at])
            assert sample is not None, lines[at]
            assert sample["name"] == name + SUFFIX[head["kind"]]
            labels = sample["labels"] or ""
            assert labels not in families[name]
            families[name][labels] = float(sample["value"])
            at += 1
        assert families[name]
    return families


PROMTOOL = shutil.which("promtool")


def families_of(text: str) -> dict[str, str]:
    """The types of the families of a text in the exposition format 0.0.4, which has no unit, no end and no info."""
    lines = text.splitlines()
    heads = [at for at, line in enumerate(lines) if line.startswith("# HELP ")]
    assert [line.split()[1] for line in lines if line.startswith("#")] == ["HELP", "TYPE"] * len(heads)
    found: dict[str, str] = {}
    for at, end in itertools.pairwise([*heads, len(lines)]):
        _, _, name, kind = lines[at + 1].split()
        assert lines[at].startswith(f"# HELP {name} ")
        assert kind in {"gauge", "counter"}
        assert name.endswith("_total") == (kind == "counter")
        assert name not in found
        found[name] = kind
        samples = [SAMPLE.fullmatch(line) for line in lines[at + 2 : end]]
        assert samples
        assert all(sample is not None and sample["name"] == name for sample in samples)
    return found


def test_a_textfile_is_in_the_format_that_its_readers_know(tmp_path: Path) -> None:
    path = tmp_path / "memconsole.prom"
    metrics.write_textfile(path, snapshot(30, 6))
    found = families_of(path.read_text())
    assert found["memconsole_build_info"] == "gauge"
    assert found["memconsole_kexecs_total"] == "counter"
    assert found["memconsole_canary_beats_total"] == "counter"


@pytest.mark.skipif(os.geteuid() != 0, reason="gives a file away: root")
def test_a_textfile_is_for_who_owns_its_directory_to_read(tmp_path: Path) -> None:
    collected = tmp_path / "collected"
    collected.mkdir()
    os.chown(collected, 12345, 12346)
    before = os.umask(0o077)
    try:
        metrics.write_textfile(collected / "memconsole.prom", snapshot(1, 1))
    finally:
        os.umask(before)
    about = (collected / "memconsole.prom").stat()
    assert (about.st_uid, about.st_gid, about.st_mode & 0o777) == (12345, 12346, 0o640)


@pytest.mark.skipif(PROMTOOL is None, reason="promtool is not installed")
def test_promtool_takes_a_textfile(tmp_path: Path) -> None:
    path = tmp_path / "memconsole.prom"
    metrics.write_textfile(path, snapshot(30, 6))
    with path.open() as file:
        said = subprocess.run(
            [str(PROMTOOL), "check", "metrics"], stdin=file, capture_output=True, text=True, check=False
        )
    assert (said.returncode, said.stderr) == (0, "")


def test_the_text_says_what_the_snapshot_says() -> None:
    shown = snapshot(30, 6)
    found = parse(metrics.text(shown))
    assert sum(found["memconsole_region_size_bytes"].values()) == sum(region.size for region in shown.regions)
    assert found["memconsole_memory_bytes"]['kind="total"'] == shown.memory.total
    assert len(found["memconsole_guest_running"]) == len(shown.guests)
    beats = {f'guest="{g.name}"': float(g.progress.beats) for g in shown.guests if g.progress}
    assert found["memconsole_canary_beats"] == beats
    assert sum(found["memconsole_findings"].values()) == len(shown.findings)


def test_nothing_is_invented_where_there_is_nothing() -> None:
    found = parse(metrics.text(snapshot(0, 0, windows=0, domains=0, events=0, findings=0)))
    assert "memconsole_region_size_bytes" not in found
    assert "memconsole_memory_bytes" in found


def test_names_that_need_quoting_are_quoted() -> None:
    shown = snapshot(1, 1)
    odd = msgspec.structs.replace(shown.regions[0], name='a"b\\c\nd', grants=())
    found = parse(metrics.text(msgspec.structs.replace(shown, regions=(odd,))))
    assert any('a\\"b\\\\c\\nd' in labels for labels in found["memconsole_region_size_bytes"])


def test_a_textfile_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "memconsole.prom"
    metrics.write_textfile(path, snapshot(1, 1))
    assert families_of(path.read_text())
    assert [found.name for found in tmp_path.iterdir()] == ["memconsole.prom"]
    with pytest.raises(KernelRefused):
        metrics.write_textfile(tmp_path / "missing" / "x", snapshot(1, 1))


@pytest.fixture
def serving(tmp_path: Path) -> Iterator[RunningService]:
    handle = serve_in_thread(ServedSource(snapshot(10, 2)), tmp_path / "control")
    handle.listen(sockets.bind(tmp_path / "metrics"), metrics.Endpoint(handle.service))
    yield handle
    handle.close()


def ask(path: Path, request: bytes) -> tuple[str, str]:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(LONG_S)
        sock.connect(str(path))
        sock.sendall(request)
        answer = b""
        while data := sock.recv(65536):
            answer += data
    head, _, body = answer.decode().partition("\r\n\r\n")
    assert f"Content-Length: {len(body.encode())}" in head
    return head.splitlines()[0], body


def test_the_endpoint_answers_http(serving: RunningService, tmp_path: Path) -> None:
    status, body = ask(tmp_path / "metrics", b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")
    assert status == "HTTP/1.1 200 OK"
    assert parse(body)


@pytest.mark.parametrize(
    ("request_", "status"),
    [(b"GET /other HTTP/1.1\r\n\r\n", "404"), (b"PUT /metrics HTTP/1.1\r\n\r\n", "405"), (b"so what\r\n\r\n", "400")],
)
def test_the_endpoint_refuses_by_status(serving: RunningService, tmp_path: Path, request_: bytes, status: str) -> None:
    assert ask(tmp_path / "metrics", request_)[0].split()[1] == status


def test_a_textfile_is_written_while_the_service_runs(serving: RunningService, tmp_path: Path) -> None:
    path = tmp_path / "memconsole.prom"
    serving.service.each(0.05, partial(metrics.write_textfile, path))
    for _ in range(2):
        until(path.exists)
        assert families_of(path.read_text())
        path.unlink()


def test_what_cannot_be_written_is_said_once_and_tried_again(
    serving: RunningService, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "later" / "memconsole.prom"
    tried: list[int] = []

    def write(shown: Snapshot) -> None:
        tried.append(1)
        metrics.write_textfile(path, shown)

    serving.service.each(0.01, write)
    until(lambda: len(tried) > 3)
    assert caplog.text.count("No such file") == 1
    path.parent.mkdir()
    until(path.exists)


def test_every_metric_is_documented_with_its_kind_and_labels() -> None:
    rows = re.findall(r"^\| `(memconsole_\w+)` \| (\w+) \| ([\w, ]*?) ?\|", DOCUMENT.read_text(), re.MULTILINE)
    documented = {name: (kind, labels.replace(" ", "")) for name, kind, labels in rows}
    failing = Condition("custody", Severity.ERROR, False, "a keeper", "it is lost", "there is none", "start one")
    shown = replace(with_usage(snapshot()), readiness=Readiness(1, 1, (failing,), 2))
    kinds = dict(re.findall(r"# TYPE (\w+) (\w+)", metrics.text(shown)))
    families = parse(metrics.text(shown))
    for name, samples in families.items():
        labels = ",".join(re.findall(r'(\w+)="', next(iter(samples))))
        assert documented.pop(name) == (kinds[name], labels)
    # no window is held here, and no guest is silent
    assert set(documented) <= {"memconsole_window_holders", "memconsole_guest_answer_age_seconds"}


def test_a_silent_guest_is_not_said_to_stand_still() -> None:
    shown = snapshot()
    first, *others = shown.guests
    silent = replace(first, state=GuestState.SILENT, silent="no answer", answered_ns=shown.taken_ns - 12 * 10**9)
    families = parse(metrics.text(replace(shown, guests=(silent, *others))))
    about = f'guest="{first.name}",kind="{first.kind}"'
    assert about not in families["memconsole_guest_running"]
    assert families["memconsole_guest_silent"][about] == 1
    assert families["memconsole_guest_answer_age_seconds"] == {about: 12}


def test_a_link_in_the_collectors_directory_leads_nowhere(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_text("theirs")
    path = tmp_path / "memconsole.prom"
    path.with_name(f".{path.name}.{os.getpid()}").symlink_to(elsewhere)
    path.symlink_to(elsewhere)
    metrics.write_textfile(path, snapshot(1, 1))
    assert elsewhere.read_text() == "theirs"
    assert not path.is_symlink()
    assert path.read_text().startswith("#")
