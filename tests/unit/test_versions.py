"""What a newer version adds harms no older reader, be it a field, a record or a message; what is rewritten keeps it."""

from __future__ import annotations

import importlib
import os
import pkgutil
import re
import sqlite3
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from msgspec import inspect
from support.synthetic import snapshot
from support.trees import Tree
from support.waiting import LONG_S

import memconsole
from memconsole import agent, newer
from memconsole.actions import AnyAction, Release
from memconsole.backend.control import Control
from memconsole.backend.custody import payloads
from memconsole.backend.custody.holder import OwnCustody
from memconsole.backend.handoff import bootplan
from memconsole.backend.ledger import log as ledger_log
from memconsole.backend.ledger import state, trail
from memconsole.backend.ledger.log import Ledger, RecordKind
from memconsole.backend.ledger.opening import LEDGER
from memconsole.backend.wire import delta, parameters
from memconsole.errors import BadFile
from memconsole.model import Region, RegionState, Request, Segment, Value

LATER = {"deep": [1, {"er": None}]}
"""What a newer version adds."""


class NotStored(Exception):
    """A type that has no JSON."""


def sample(kind: inspect.Type) -> Any:  # noqa: C901 - a line a kind of type
    """JSON values of a type, with every field there."""
    match kind:
        case inspect.StructType():
            fields = {field.encode_name: sample(field.type) for field in kind.fields}
            return fields if kind.tag_field is None else {kind.tag_field: kind.tag, **fields}
        case inspect.UnionType():
            return sample(next(each for each in kind.types if not isinstance(each, inspect.NoneType)))
        case inspect.VarTupleType() | inspect.ListType():
            return [sample(kind.item_type)]
        case inspect.TupleType():
            return [sample(each) for each in kind.item_types]
        case inspect.DictType():
            return {str(sample(kind.key_type)): sample(kind.value_type)}
        case inspect.EnumType():
            return next(iter(kind.cls)).value
        case inspect.LiteralType():
            return kind.values[0]
        case inspect.IntType() | inspect.FloatType():
            return 1
        case inspect.BoolType():
            return True
        case inspect.StrType() | inspect.AnyType():
            return "x"
        case inspect.BytesType():
            return "eA=="
        case inspect.RawType():
            return {}
    raise NotStored(kind)


def structs(cls: type[msgspec.Struct]) -> Iterator[type[msgspec.Struct]]:
    for below in cls.__subclasses__():
        yield below
        yield from structs(below)


def discovered() -> dict[str, type[msgspec.Struct]]:
    """Every struct of the package that has a JSON form, by name: what may be stored or sent."""
    for module in pkgutil.walk_packages(memconsole.__path__, "memconsole."):
        importlib.import_module(module.name)
    found = {}
    for cls in structs(msgspec.Struct):
        if cls.__module__.startswith("memconsole.") and cls.__struct_fields__:
            try:
                sample(inspect.type_info(cls))
            except (NotStored, NameError, TypeError):  # no decoder of JSON takes it
                continue
            found[f"{cls.__module__.removeprefix('memconsole.')}.{cls.__qualname__}"] = cls
    return found


STORED = discovered()


def encoded(values: Any) -> bytes:
    return msgspec.json.encode(values)


def test_what_is_stored_and_sent_is_found() -> None:
    for name in (
        "model.snapshot.Snapshot", "actions.Map", "backend.ledger.state.DoneRecord",
        "backend.dma.address_spaces.AttachedDevice",
        "backend.exports.userfault.KeptUffd",
        "backend.exports.mount_record.MountRecord",
        "backend.handoff.manifest.Manifest", "backend.handoff.bootplan.Resume",
        "backend.custody.suspended.SuspendedGuest", "backend.wire.protocol.Fault", "backend.wire.client.Greeting",
        "backend.wire.delta.Watched", "backend.wire.parameters.Hello",
    ):  # fmt: skip
        assert name in STORED


@pytest.mark.parametrize("cls", STORED.values(), ids=STORED.keys())
def test_an_unknown_field_is_passed_over_or_refused_by_name(cls: type[msgspec.Struct]) -> None:
    values = sample(inspect.type_info(cls))
    known = msgspec.json.decode(encoded(values), type=cls)
    raw = encoded({**values, "later": LATER})
    if issubclass(cls, Request | parameters.Strict):
        with pytest.raises(msgspec.ValidationError, match="`later`"):
            msgspec.json.decode(raw, type=cls)
    else:
        assert msgspec.json.decode(raw, type=cls) == known


@pytest.mark.parametrize("cls", STORED.values(), ids=STORED.keys())
def test_a_field_with_a_default_may_be_missing(cls: type[msgspec.Struct]) -> None:
    values = sample(inspect.type_info(cls))
    for field in msgspec.structs.fields(cls):
        if not field.required:
            less = msgspec.json.decode(encoded({k: v for k, v in values.items() if k != field.encode_name}), type=cls)
            assert field.name in cls.__struct_fields__
            assert getattr(less, field.name) == (
                field.default if field.default is not msgspec.NODEFAULT else field.default_factory()
            )


def with_later(values: Any) -> Any:
    """The same JSON, with an unknown field in every object that is a struct's."""
    if isinstance(values, dict):
        return {**{name: with_later(each) for name, each in values.items()}, "later": LATER}
    return [with_later(each) for each in values] if isinstance(values, list) else values


KEPT = {
    name: cls
    for name, cls in STORED.items()
    if issubclass(cls, Value) and not issubclass(cls, Request) and not cls.__struct_config__.omit_defaults
}


@pytest.mark.parametrize("cls", KEPT.values(), ids=KEPT.keys())
def test_what_is_unknown_in_any_depth_is_put_back(cls: type[Value]) -> None:
    values = sample(inspect.type_info(cls))
    try:
        raw = encoded(with_later(values))
        value = msgspec.json.decode(raw, type=cls)
    except msgspec.ValidationError:  # a dict of numbers or a request inside: only at the top then
        raw = encoded({**values, "later": LATER})
        value = msgspec.json.decode(raw, type=cls)
    assert msgspec.json.decode(newer.encode(value, newer.rest(raw, value))) == msgspec.json.decode(raw)


class Row(Value, frozen=True):
    n: int


class Rows(Value, frozen=True):
    rows: tuple[Row, ...]


def test_elements_of_a_list_keep_what_is_theirs_when_others_come_and_go() -> None:
    said = [{"n": 1, "later": "a"}, {"n": 2}, {"n": 3, "later": "c"}]
    value = msgspec.json.decode(encoded({"rows": said}), type=Rows)
    left = newer.rest(encoded({"rows": said}), value)
    assert newer.put_back({"rows": [{"n": 2}, {"n": 3}, {"n": 4}]}, left) == {
        "rows": [{"n": 2}, {"n": 3, "later": "c"}, {"n": 4}]
    }


# --- the ledger -------------------------------------------------------------------------------------------------

REGION = Region("web", "memfd", 4096, 4096, RegionState.RESERVED, segments=(Segment(7, 1, 4096),))


def region(**more: Any) -> dict[str, Any]:
    return {**msgspec.json.decode(encoded(REGION)), **more}


def records(*written: tuple[int, Any]) -> list[ledger_log.Record]:
    return [ledger_log.Record(seq, kind, encoded(values)) for seq, (kind, values) in enumerate(written, 1)]


def event(**change: Any) -> dict[str, Any]:
    return {"at_ns": 1, "kind": "x", "subject": "web", "text": "", "change": change}


def again(found: state.State) -> state.State:
    """The state after a compaction, read back."""
    return state.fold(ledger_log.Record(seq, kind, raw) for seq, (kind, raw) in enumerate(found.compacted(), 1))


def test_a_compacted_ledger_keeps_what_it_does_not_know_of_an_entity() -> None:
    newest = region(tier="gold", segments=[{"inode": 7, "device": 1, "size": 4096, "start": 0, "whole": 0, "tier": 2}])
    found = state.fold(records((RecordKind.EVENT, event(regions=[newest]))))
    assert found.regions == {"web": REGION}
    for _ in range(2):
        found = again(found)
        (kept,) = msgspec.json.decode(found.compacted()[0][1])["everything"]["regions"]
        assert kept == newest


def test_an_entity_that_is_written_again_keeps_it_and_one_that_is_gone_does_not() -> None:
    found = state.fold(records((RecordKind.EVENT, event(regions=[region(tier="gold")]))))
    moved = msgspec.structs.replace(REGION, state=RegionState.MAPPED)
    written = state.EventRecord(2, "x", "web", "", change=state.StateChange(regions=(moved,)))
    assert msgspec.json.decode(found.encode(written))["change"]["regions"][0] == {
        **region(tier="gold"),
        "state": "mapped",
    }
    gone = found.apply_record(
        2, state.EventRecord(2, "x", "web", "", change=state.StateChange(without_regions=("web",)))
    )
    assert "tier" not in msgspec.json.decode(gone.encode(written))["change"]["regions"][0]
    assert found.rests
    assert not gone.rests


def test_tables_and_records_that_are_unknown_are_kept_in_order_and_told_of() -> None:
    found = state.fold(
        records(
            (
                RecordKind.STATE,
                {"everything": {"arenas": ["a"], "regions": [region()]}, "next_grant": 3, "next_arena": 2},
            ),
            (77, {"what": "nobody knows"}),
            (RecordKind.EVENT, event(regions=[region()], arenas=["b"])),
        )
    )
    (finding,) = found.findings()
    assert (finding.id, finding.evidence) == ("ledger-unknown", "of kinds 4, 77")
    for _ in range(2):
        found = again(found)
        assert found.regions == {"web": REGION}
        whole, strange, change = found.compacted()
        assert msgspec.json.decode(whole[1])["everything"]["arenas"] == ["a"]
        assert msgspec.json.decode(whole[1])["next_arena"] == 2
        assert strange == (77, b'{"what":"nobody knows"}')
        assert msgspec.json.decode(change[1])["change"]["arenas"] == ["b"]
        assert msgspec.json.decode(change[1])["change"]["regions"] == []  # what is known stands in the whole


@pytest.mark.parametrize("action", [{"do": "freeze", "region": "web"}, {"do": "release", "region": "web", "later": 1}])
def test_an_action_that_is_unknown_is_ended_by_whoever_knows_it(action: dict[str, Any]) -> None:
    begun = (RecordKind.INTENT, {"at_ns": 1, "action": action, "subject": "web"})
    found = state.fold(records(begun))
    assert (found.unfinished, list(found.unknown_intents)) == ({}, [1])
    (finding,) = found.findings()
    assert finding.id == "action-unfinished"
    assert action["do"] in finding.observed
    ended = state.fold(records(begun, (RecordKind.DONE, {"intent": 1, "at_ns": 2, "text": "done"})))
    assert not ended.unknown_intents
    assert [each.kind for each in ended.events] == [action["do"]]


def test_an_intent_that_is_broken_is_no_unknown_action() -> None:
    raw = encoded({"at_ns": "soon", "action": msgspec.to_builtins(Release("web")), "subject": "web"})
    with pytest.raises(BadFile):
        state.decode(ledger_log.Record(1, RecordKind.INTENT, raw))
    assert msgspec.json.decode(encoded(Release("web")), type=AnyAction) == Release("web")


# --- custody ----------------------------------------------------------------------------------------------------


class Surviving(OwnCustody):
    """Custody that a control process takes over."""

    survives = True

    def close(self) -> None:
        """What is held stays held."""


def started(tmp_path: Path, custody: OwnCustody) -> list[str]:
    """The findings of a control process that takes over what custody holds, on a host where nothing else runs."""
    tree = Tree(tmp_path / "host")
    tree.host()
    tree.meminfo()
    control = Control(tmp_path / "run", custody, root=tree.root)
    try:
        return [f"{found.id} {found.subject}" for found in control.snapshot().findings]
    finally:
        control.close()


FIELDS: dict[str, dict[str, Any]] = {
    "uffd:g1": {"grant": "g1", "region": "r", "pid": 1, "start_ticks": 1, "address": 0, "length": 4096, "offset": 0,
                "page": 4096, "modes": 1, "lazy": True},
    "vfio:0000:00:04.0": {"bdf": "0000:00:04.0", "guest": "vm"},
    "region:r:0": region(),
    "aside:vm": {"region": "r", "paused": True},
}  # fmt: skip


@pytest.mark.parametrize("name", FIELDS)
def test_a_payload_with_more_or_with_nothing_known_in_it_keeps_no_service_from_starting(
    tmp_path: Path, name: str
) -> None:
    payloads: tuple[object, ...] = ({**FIELDS[name], "later": LATER}, {"later": 1}, [], "x")
    for payload in payloads:
        custody = Surviving()
        fd = os.memfd_create("x")
        custody.put(name, fd, encoded(payload))
        os.close(fd)
        started(tmp_path, custody)
        OwnCustody.close(custody)


@pytest.mark.parametrize("content", [b'{"boot_id":"x","later":1}', b"[]", b"", b"\xff"])
def test_a_table_of_the_mount_keeps_no_service_from_starting(tmp_path: Path, content: bytes) -> None:
    custody = Surviving()
    fd = os.memfd_create("x")
    os.write(fd, content)
    custody.put("mount", fd)
    os.close(fd)
    found = started(tmp_path, custody)
    assert ("custody-unknown mount-unread" in found) == (b"later" not in content)
    OwnCustody.close(custody)


def test_what_is_unknown_in_custody_is_kept_and_told_of(tmp_path: Path) -> None:
    custody = Surviving()
    fd = os.memfd_create("x")
    for name in ("arena:a", "arena:b", "iommu:vm"):
        custody.put(name, fd, b'{"size":1}')
    os.close(fd)
    found = started(tmp_path, custody)
    assert {"custody-unknown arena", "custody-unknown iommu:vm"} <= set(found)
    assert {"arena:a", "arena:b", "iommu:vm"} <= set(custody.names())
    OwnCustody.close(custody)


def test_a_payload_that_is_written_again_keeps_what_it_does_not_know() -> None:
    custody = OwnCustody()
    fd = os.memfd_create("x")
    custody.put("region:web:0", fd, encoded(region(tier="gold")))
    payloads.put(custody, "region:web:0", fd, REGION)
    payloads.put(custody, "fresh:web:0", fd, REGION, like="region:web:0")
    for name in ("region:web:0", "fresh:web:0"):
        copy, payload = custody.get(name)
        os.close(copy)
        assert msgspec.json.decode(payload) == region(tier="gold")
    os.close(fd)
    custody.close()


def test_a_service_that_starts_with_a_newer_ledger_works_and_loses_nothing(tmp_path: Path) -> None:
    custody = Surviving()
    made = Ledger.create("boot")
    made.append(77, b"newer")
    custody.put(LEDGER, made.fd)
    made.close()
    assert "ledger-unknown ledger" in started(tmp_path, custody)
    copy, _ = custody.get(LEDGER)
    taken = Ledger.open(copy)
    assert [(record.kind, record.payload) for record in taken.records()] == [(77, b"newer")]
    taken.close()
    OwnCustody.close(custody)


# --- messages and files ------------------------------------------------------------------------------------------


def test_a_delta_of_a_newer_service_is_passed_over_where_it_is_unknown() -> None:
    old = snapshot(2, 1)
    sent = delta.Delta({"arenas": [1]}, {"tiers": [{"a": 1}]}, {"tiers": ["b"]})
    assert delta.apply(old, sent) == old


def test_an_agent_answers_a_type_it_does_not_know_and_takes_longer_bodies(tmp_path: Path) -> None:
    import socket

    listening = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listening.bind(str(tmp_path / "agents"))
    listening.listen()
    listening.settimeout(LONG_S)
    with agent.Agent(tmp_path / "agents") as mine, listening:
        connection, _ = listening.accept()
        connection.settimeout(LONG_S)
        assert agent.unpack(connection.recv(8192)).type is agent.Type.HELLO
        connection.send(agent.HEAD.pack(agent.MAGIC, agent.VERSION, 99, 1, agent.HEAD.size + 8) + bytes(8))
        answer = agent.unpack(connection.recv(8192))
        assert (answer.type, answer.id) == (agent.Type.DONE, 1)
        assert agent.DONE.unpack(answer.body)[0] == 95  # EOPNOTSUPP
        fd = os.memfd_create("x")
        os.truncate(fd, 4096)
        body = agent.GRANT.pack(agent.pack_name("g1"), 0, 4096, agent.NO_GPA, 2, 0) + b"what a newer one adds"
        socket.send_fds(connection, [agent.pack(agent.Type.GRANT, 2, body)], [fd])
        assert agent.DONE.unpack(agent.unpack(connection.recv(8192)).body)[0] == 0
        assert list(mine.grants) == ["g1"]
        os.close(fd)
        connection.close()


def test_a_boot_plan_with_a_record_that_is_unknown_means_the_rest() -> None:
    import zlib

    plan = bootplan.BootPlan((bootplan.Hold("s", 1, "n", b"p"),))
    rest = struct.pack("<IHH", 16, 99, 0)
    raw = bytearray(bootplan.encode(plan) + b"MCRC" + struct.pack("<I", zlib.crc32(rest)) + rest)
    struct.pack_into("<II", raw, 16, len(raw), 2)
    struct.pack_into("<I", raw, 12, 0)
    struct.pack_into("<I", raw, 12, zlib.crc32(raw))
    assert bootplan.decode(bytes(raw)) == plan


def test_an_audit_trail_with_a_column_more_is_read_and_written(tmp_path: Path) -> None:
    path = tmp_path / "audit.sqlite"
    first = trail.AuditTrail(path, "c", "b")
    first.absorb([ledger_log.Record(1, RecordKind.EVENT, b"{}")])
    first.close()
    with sqlite3.connect(path) as database:
        database.execute("ALTER TABLE records ADD COLUMN later TEXT NOT NULL DEFAULT 'x'")
    database.close()
    second = trail.AuditTrail(path, "c", "b")
    second.absorb([ledger_log.Record(2, 77, b"{}")])
    assert [(row.seq, row.kind) for row in second.entries()] == [(1, "event"), (2, "77")]
    second.close()


VERSIONS = re.compile(r"^(?:#define \w*VERSION\s+|_?(?:[A-Z]+_)?VERSION = |PROTOCOL = )\d", re.MULTILINE)


def test_the_rule_for_raising_it_stands_beside_every_version() -> None:
    root = Path(memconsole.__path__[0])
    found = 0
    for path in sorted(each for kind in ("py", "c", "h") for each in root.rglob(f"*.{kind}")):
        if "third_party" in path.parts:
            continue
        text = path.read_text(encoding="utf-8")
        for match in VERSIONS.finditer(text):
            found += 1
            beside = text[max(0, match.start() - 500) : match.start()] if path.suffix in {".c", ".h"} else ""
            beside += text[match.end() : match.end() + 60]
            assert "Raised " in beside, f"{path.name}: {match.group()}"
    assert found >= 17


def test_a_record_of_a_resume_of_another_version_is_refused() -> None:
    with pytest.raises(BadFile, match="cannot be read") as caught:
        bootplan.read_resume(b'{"version":2,"mode":"luo","phases":[],"guests":[],"held":[],"findings":[]}')
    assert caught.value.why == "it is of version 2"
