"""Bytes that others wrote: whatever they are, a decoder returns a value or raises an error that has a name."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import struct
import threading
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from support import synthetic

from memconsole import action_input, decoding, macros, recording
from memconsole.backend.diagnose import inspect
from memconsole.backend.handoff import bootplan, manifest
from memconsole.backend.history import former, json_delta, store
from memconsole.backend.ledger import log as ledger_log
from memconsole.backend.ledger import state, trail
from memconsole.backend.wire import client, delta, protocol
from memconsole.decoding import Undecodable
from memconsole.errors import BadFile, MacroUsage, MemconsoleError
from memconsole.views import settings as console_settings

DEEP = 5000
WIDE_INTEGER = b"9" * 5000

# --- its bounds -------------------------------------------------------------------------------------------------


class Box(msgspec.Struct):
    """A value with a place for anything."""

    inside: Any = None
    number: int = 0


@pytest.mark.parametrize("kind", [Any, Box])
@pytest.mark.parametrize("depth", [decoding.DEPTH + 2, 500, DEEP, 100 * DEEP])
def test_json_nested_too_deeply(depth: int, kind: Any) -> None:
    raw = b'{"unknown":' + b"[" * depth + b"]" * depth + b"}"
    if kind is Box and depth < DEEP:
        assert decoding.json(raw, kind, what="it") == Box()  # a member that is skipped costs nothing
        return
    with pytest.raises(Undecodable) as caught:
        decoding.json(raw, kind, what="it")
    assert caught.value.fault == "too deep"
    assert caught.value.what == "it cannot be read"


def test_json_as_deep_as_is_allowed() -> None:
    depth = decoding.DEPTH - 1
    value = decoding.json(b"[" * depth + b"]" * depth, what="it")
    for _ in range(depth - 1):
        (value,) = value
    assert value == []


@pytest.mark.parametrize(
    ("raw", "fault"),
    [
        (b"", "truncated"),
        (b'{"number":', "truncated"),
        (b"{]", "malformed"),
        (b'{"number":"one"}', "unfit"),
        (b"[]", "unfit"),
        (b'{"number":%b}' % WIDE_INTEGER, "unfit"),
        (b'{"number":1e999}', "unfit"),
        (b'{"inside":"\xff"}', "malformed"),
    ],
)
def test_json_that_is_another_value(raw: bytes, fault: str) -> None:
    with pytest.raises(Undecodable) as caught:
        decoding.json(raw, Box, what="it")
    assert caught.value.fault == fault


def test_a_document_larger_than_its_limit() -> None:
    with pytest.raises(Undecodable, match="larger than 10 bytes"):
        decoding.json(b'"' + b"a" * 10 + b'"', what="it", limit=10)
    with pytest.raises(Undecodable, match="larger than 10 bytes"):
        decoding.toml(b"a = 1\n" * 10, what="it", limit=10)


@pytest.mark.parametrize(
    "raw",
    [
        b"x=" + b"[" * DEEP + b"]" * DEEP,
        b"x=" + b"{a=" * DEEP + b"1" + b"}" * DEEP,
        b"a." * DEEP + b"a = 1",
        b"[" + b"a." * DEEP + b"a]",
        b"x = '\xff'",
        b"x = 9999-99-99",
        b"x = " + WIDE_INTEGER,
    ],
)
def test_toml_of_every_bad_kind(raw: bytes) -> None:
    with pytest.raises(Undecodable):
        decoding.toml(raw, what="it")


def test_a_stream_that_inflates_without_end() -> None:
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    raw = packer.compress(bytes(1 << 20)) + packer.flush()
    assert len(decoding.Inflater(limit=1 << 20).inflate(raw, what="it")) == 1 << 20
    with pytest.raises(Undecodable, match="more than 1048575 bytes") as caught:
        decoding.Inflater(limit=(1 << 20) - 1).inflate(raw, what="it")
    assert caught.value.fault == "too large"
    with pytest.raises(Undecodable):
        decoding.Inflater().inflate(b"\xff\xff\xff", what="it")


def test_a_file_that_never_ends() -> None:
    with pytest.raises(Undecodable, match="larger than 4096 bytes"):
        decoding.contents("/dev/zero", limit=4096)
    with pytest.raises(BadFile, match="No such file"):
        decoding.contents("/nowhere/at/all")
    with pytest.raises(BadFile, match="null"):
        decoding.contents("a\0b")


# --- each decoder -----------------------------------------------------------------------------------------------

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(1 << 70), 1 << 70),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=8),
)
WORDS = st.sampled_from(
    "do name host format version step params parameters method error - # + 0 at_ns regions".split(" ")  # noqa: SIM905
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(WORDS | st.text(max_size=5), inner, max_size=5)
    ),
    max_leaves=20,
)


def _json(value: Any) -> bytes:
    import json

    return json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass")


HOSTILE = (
    b"[" * DEEP,
    b'{"a":' * DEEP,
    b'{"a":' + b"[" * 900 + b"]" * 900 + b"}",
    WIDE_INTEGER,
    b'"\xff"',
    b'"\\ud800"',
    b"",
    b"null",
)
DOCUMENTS = st.one_of(
    VALUES.map(_json),
    st.binary(max_size=60),
    st.tuples(VALUES.map(_json), st.integers(0, 40)).map(lambda cut: cut[0][: -cut[1] or None]),
    st.sampled_from(HOSTILE),
)
named = contextlib.suppress(MemconsoleError)
many = settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))


@many
@given(DOCUMENTS)
def test_custody_ledger_audit_and_manifest(raw: bytes) -> None:
    for kind in ledger_log.RecordKind:
        with named:
            state.decode(ledger_log.Record(1, kind, raw))
    with named:
        state.decode(ledger_log.Record(1, 4711, raw))
    with named:
        ledger_log.Record(1, 1, raw).value()
    assert isinstance(trail.time_of(raw), int)
    with named:
        bootplan.read_resume(raw)
    plan = bootplan.encode(bootplan.BootPlan(()))
    head = struct.pack("<8sIIQ", b"MCMANIFS", manifest.VERSION, zlib.crc32(raw), len(raw))
    with named:
        manifest.read(plan + bytes(-len(plan) % 4096) + head + raw)


@many
@given(DOCUMENTS)
def test_wire(raw: bytes) -> None:
    for name in ("io.memconsole.Refused", "io.memconsole.KernelRefused", "org.varlink.service.InvalidParameter", "a.B"):
        assert isinstance(protocol.error_of(name, msgspec.Raw(raw)), MemconsoleError)
    for kind in (protocol.VarlinkCall, protocol.VarlinkReply, client.Greeting):
        with named:
            decoding.json(raw, kind, what="it")


@many
@given(VALUES)
def test_plain_values(value: Any) -> None:
    with named:
        action_input.decode(value)
    with named:
        action_input.build("reserve", {"name": value, "size": value, "store": value})
    if isinstance(value, dict):
        with named:
            delta.apply(synthetic.snapshot(), delta.Delta(fields=value))
        with named:
            delta.apply(synthetic.snapshot(), delta.Delta(changed={"regions": [value]}))
    with named, decoding.named("it", ""):
        json_delta.apply({"host": {"name": "a"}, "regions": [1, {"a": 2}]}, value)


@many
@given(st.one_of(DOCUMENTS, st.text(max_size=50).map(lambda text: text.encode("utf-8", "surrogatepass"))))
@example(b"x=" + b"[" * DEEP)
@example(b"[[step]]\ndo = {}\n")
@example(b"[[step]]\ndo = 'reserve'\nname = [[[]]]\n")
@example(b"step = [1]")
@example(b"params = 1\nstep = [{do = 'reserve', name = 'a', size = '1'}]")
@example(b"step = [{do = 'reserve', name = 2020-01-01, size = 1}]")
@example(b"[[step]]\ndo = 'reserve'\nname = '$$${'\nsize = '" + WIDE_INTEGER + b"'\n")
@example(b"name = 'x'\npath = 1\n[[step]]\nview = 'regions'\n")
def test_macros_and_settings(tmp_path_factory: pytest.TempPathFactory, raw: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "it.toml"
    path.write_bytes(raw)
    with named:
        macros.load(path)
    with named:
        console_settings.load([path])


def frames(*payloads: bytes) -> bytes:
    """A history of format 1 whose checksums are right, whatever its payloads say."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    out = [struct.pack("<8sII", b"MCHISTRY", 1, 0)]
    for key, content in enumerate(payloads, 1):
        piece = packer.compress(content) + packer.flush(zlib.Z_SYNC_FLUSH)
        head = struct.pack("<QIII", key, len(piece), zlib.crc32(piece), 0)
        out += [head, struct.pack("<I", zlib.crc32(head)), piece]
    return b"".join(out)


def history(directory: Path, *payloads: bytes) -> Path:
    """A history whose checksums are right, whatever its payloads say."""
    path = directory / store.FILE
    path.unlink(missing_ok=True)
    chapter = store.Chapter(1)
    with contextlib.closing(sqlite3.connect(path)) as database:
        database.execute(store.SCHEMA)
        for key, content in enumerate(payloads, 1):
            database.execute("INSERT INTO frames VALUES (?, 1, ?)", (key, chapter.packed(key, content)))
            chapter.append(key, content)
        database.execute(f"PRAGMA application_id = {store.APPLICATION}")
        database.execute(f"PRAGMA user_version = {store.VERSION}")
        database.commit()
    return path


@many
@given(st.lists(DOCUMENTS, max_size=3))
@example([b'"abc"'])
@example([b'{"host":[]}'])
@example([b'{"host":{"name":[]}}'])
@example([b'{"host":{"name":"a"}}', b'{"host":{"name":[1]}}', b"3"])
@example([b"[" * DEEP + b"]" * DEEP])
def test_files(tmp_path_factory: pytest.TempPathFactory, payloads: list[bytes]) -> None:
    path = tmp_path_factory.getbasetemp() / "00000000000000000001.history"
    path.write_bytes(frames(*payloads))
    with named:
        inspect.describe(path)
    with named:
        inspect.describe(history(path.parent, *payloads))
    found = store.History(path.parent)
    with named:
        found.at(10)
    found.close()
    document = payloads[0] if payloads else b""
    for raw in (document, b'{"format":"memconsole.snapshot","version":1,"x":' + document + b"}"):
        other = path.with_suffix(".snap")
        other.write_bytes(raw)
        with named:
            recording.read(other)


def test_a_history_that_inflates_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(former, "LARGEST_FRAME", 1 << 20)
    path = tmp_path / "00000000000000000001.history"
    path.write_bytes(frames(b'"' + b"a" * (2 << 20) + b'"'))
    found = inspect.describe(path)
    assert found.facts["snapshots"] == 0
    assert "inflates to more than" in found.findings[0].observed


def test_a_macro_of_another_shape_is_a_usage_error(tmp_path: Path) -> None:
    path = tmp_path / "it.toml"
    path.write_text("name = 1\n[[step]]\nview = 'regions'\n")
    with pytest.raises(MacroUsage):
        macros.load(path)


# --- what cannot be sought in -----------------------------------------------------------------------------------


@pytest.fixture
def pipe() -> Iterator[Any]:
    """Makes a path that can be read once, from the start to the end, as a shell's ``<(...)`` is."""
    ends: list[int] = []
    threads: list[threading.Thread] = []

    def make(content: bytes) -> Path:
        out, into = os.pipe()
        ends.append(out)

        def fill() -> None:
            with os.fdopen(into, "wb") as file, contextlib.suppress(BrokenPipeError):
                file.write(content)

        threads.append(threading.Thread(target=fill))
        threads[-1].start()
        return Path(f"/dev/fd/{out}")

    yield make
    for end in ends:
        os.close(end)
    for thread in threads:
        thread.join()


def test_snapshots_with_and_without_tables_come_through_a_pipe(tmp_path: Path, pipe: Any) -> None:
    source = synthetic.SyntheticSource()
    plain = recording.write(tmp_path / "plain", source.snapshot())
    assert recording.read(pipe((tmp_path / "plain").read_bytes()))[0] == plain
    with source.extents("guest:db1") as table:
        packed = recording.write(tmp_path / "packed", source.snapshot(), {"guest:db1": table})
    found, tables = recording.read(pipe((tmp_path / "packed").read_bytes()))
    assert found == packed
    assert list(tables) == ["guest:db1"]
    tables["guest:db1"].close()


def test_what_comes_through_a_pipe_is_told_apart_and_called_as_it_was_named(tmp_path: Path, pipe: Any) -> None:
    recording.write(tmp_path / "plain", synthetic.snapshot())
    named_so = pipe((tmp_path / "plain").read_bytes())
    found = inspect.describe(named_so)
    assert (found.kind, found.file) == ("snapshot", str(named_so))
    assert inspect.describe(pipe(frames(b'{"host":{"name":"a"}}'))).kind == "history"
    made = history(tmp_path, b'{"host":{"name":"a"}}')
    with contextlib.closing(sqlite3.connect(made)) as database:
        database.execute("PRAGMA journal_mode = WAL")
    found = inspect.describe(pipe(made.read_bytes()))
    assert (found.kind, found.facts["hosts"], found.findings) == ("history", ["a"], ())
    empty = pipe(b"")
    with pytest.raises(BadFile, match=f"{empty} is empty"):
        inspect.describe(empty)
