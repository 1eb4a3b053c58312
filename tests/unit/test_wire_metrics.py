"""Metrics: text that follows the OpenMetrics grammar, over a socket and in a file."""

from __future__ import annotations

import re
import socket
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import msgspec
import pytest
from support.served import ServedSource
from support.synthetic import snapshot

from memconsole.backend import metrics
from memconsole.backend.wire import places
from memconsole.backend.wire.embedded import Serving, serve_in_thread
from memconsole.errors import KernelRefused
from memconsole.model import Snapshot

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
    assert parse(path.read_text())
    assert [found.name for found in tmp_path.iterdir()] == ["memconsole.prom"]
    with pytest.raises(KernelRefused):
        metrics.write_textfile(tmp_path / "missing" / "x", snapshot(1, 1))


@pytest.fixture
def serving(tmp_path: Path) -> Iterator[Serving]:
    handle = serve_in_thread(ServedSource(snapshot(10, 2)), tmp_path / "control")
    handle.listen(places.bind(tmp_path / "metrics"), metrics.Endpoint(handle.service))
    yield handle
    handle.close()


def ask(path: Path, request: bytes) -> tuple[str, str]:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(10)
        sock.connect(str(path))
        sock.sendall(request)
        answer = b""
        while data := sock.recv(65536):
            answer += data
    head, _, body = answer.decode().partition("\r\n\r\n")
    assert f"Content-Length: {len(body.encode())}" in head
    return head.splitlines()[0], body


def test_the_endpoint_answers_http(serving: Serving, tmp_path: Path) -> None:
    status, body = ask(tmp_path / "metrics", b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")
    assert status == "HTTP/1.1 200 OK"
    assert parse(body)


@pytest.mark.parametrize(
    ("request_", "status"),
    [(b"GET /other HTTP/1.1\r\n\r\n", "404"), (b"PUT /metrics HTTP/1.1\r\n\r\n", "405"), (b"so what\r\n\r\n", "400")],
)
def test_the_endpoint_refuses_by_status(serving: Serving, tmp_path: Path, request_: bytes, status: str) -> None:
    assert ask(tmp_path / "metrics", request_)[0].split()[1] == status


def test_a_textfile_is_written_while_the_service_runs(serving: Serving, tmp_path: Path) -> None:
    path = tmp_path / "memconsole.prom"
    serving.service.each(0.05, partial(metrics.write_textfile, path))
    for _ in range(2):
        until(path.exists)
        assert parse(path.read_text())
        path.unlink()


def test_what_cannot_be_written_is_said_once_and_tried_again(
    serving: Serving, tmp_path: Path, caplog: pytest.LogCaptureFixture
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


def until(condition: Callable[[], object]) -> None:
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_every_metric_is_documented_with_its_kind_and_labels() -> None:
    rows = re.findall(r"^\| `(memconsole_\w+)` \| (\w+) \| ([\w, ]*?) ?\|", DOCUMENT.read_text(), re.MULTILINE)
    documented = {name: (kind, labels.replace(" ", "")) for name, kind, labels in rows}
    kinds = dict(re.findall(r"# TYPE (\w+) (\w+)", metrics.text(snapshot())))
    families = parse(metrics.text(snapshot()))
    for name, samples in families.items():
        labels = ",".join(re.findall(r'(\w+)="', next(iter(samples))))
        assert documented.pop(name) == (kinds[name], labels)
    assert set(documented) <= {"memconsole_window_holders"}  # nobody holds one here
