"""What a file is and whether it is whole: snapshots, ledger images, history files, audit trails, handovers, and the
save images of libvirt's guests.

Nothing is written and no control process is needed. A ledger's image is read from whoever holds its memfd, for example
``/proc/$(pgrep mc-keeper)/fd/N``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from memconsole import decoding
from memconsole.backend.history import former, maps, store
from memconsole.backend.ledger import log as ledger_log
from memconsole.backend.managers import saveimage
from memconsole.errors import BadFile, NotFound
from memconsole.model import Finding, Severity, Value

if TYPE_CHECKING:
    import sqlite3

    from memconsole.backend.kernel.handover.values import Handover


class Description(Value, frozen=True):
    """What a file is: its kind, format version, facts by name, and what is wrong with it (nothing if it is whole)."""

    file: str
    kind: str
    version: int
    facts: dict[str, Any]
    findings: tuple[Finding, ...] = ()


def describe(path: Path) -> Description:
    """What a file, or what comes out of a pipe, is, from its first bytes, after all its checksums were checked.

    Raises:
        BadFile: it cannot be read, is none of ours, of a newer version, or too damaged to say anything.
    """
    with decoding.sought(path) as where:
        return msgspec.structs.replace(_describe(where, str(path)), file=str(path))


def _describe(path: Path, name: str) -> Description:
    try:
        with path.open("rb") as file:
            start = file.read(16)
            file.seek(4096)
            second = file.read(8)
    except OSError as error:
        raise BadFile(f"{path} cannot be read", error.strerror or str(error), "check the name") from None
    if ledger_log.MAGIC in {start[:8], second}:
        return _ledger(path)
    if start[:8] == former.MAGIC:
        return _former(path)
    if start == b"SQLite format 3\0":
        return _database(path)
    if start.startswith((b"\x7fELF", b"\xd0\x0d\xfe\xed")):
        return _handover(path)
    if start in {saveimage.MAGIC, saveimage.PARTIAL}:
        return _save_image(path, name)
    return _snapshot(path, name)


def _save_image(path: Path, name: str) -> Description:
    """A save image of libvirt's: whether it is whole, and whether anything could start from it."""
    with path.open("rb", buffering=0) as file:
        found = saveimage.examine(file.fileno(), name)
    lock, stream = found.image.lock, found.stream
    facts = {
        "running": found.image.running,
        "region": lock.region if lock else None,
        "digest": lock.digest if lock else None,
        "locked": stream.was_locked if stream else None,
        "machine": stream.machine if stream else None,
        "blocks": [{"name": each.name, "size": each.length, "pages": each.kept} for each in stream.blocks]
        if stream
        else [],
    }
    findings = (_damage("image-damaged", path, found.damage),) if found.damage else ()
    return Description(str(path), "save-image", saveimage.VERSION, facts, findings)


def _ledger(path: Path) -> Description:
    image = ledger_log.read(decoding.contents(path))
    block = image.superblock
    return Description(
        str(path),
        "ledger",
        ledger_log.VERSION,
        {
            "chain": block.chain,
            "generation": block.generation,
            "bytes_used": image.end - block.start,
            "bytes_capacity": block.capacity,
            "records": [_record(record) for record in image.records],
        },
        (image.dropped.finding(),) if image.dropped is not None else (),
    )


def _record(record: ledger_log.Record) -> dict[str, Any]:
    try:
        shown = record.value()
    except BadFile:
        shown = record.payload.hex()
    kind = (
        ledger_log.RecordKind(record.kind).name.lower()
        if record.kind in ledger_log.RecordKind.__members__.values()
        else record.kind
    )
    return {"seq": record.seq, "kind": kind, "payload": shown}


def _former(path: Path) -> Description:
    """A history of format 1."""
    former.check(path)
    hosts: set[str] = set()
    keys: list[int] = []
    damage: list[str] = []
    try:
        for key, text in former.texts(path):
            if not keys:
                hosts.add(_host(text, f"frame 0 of {path}"))
            keys.append(key)
    except BadFile as error:
        damage.append(str(error))
    return _recorded(path, former.FORMAT, keys, hosts, damage)


def _host(text: bytes, what: str) -> str:
    with decoding.named(what, ""):
        return str(decoding.json(text, dict[str, Any], what=what)["host"]["name"])


def _recorded(path: Path, version: int, keys: list[int], hosts: set[str], damage: list[str]) -> Description:
    facts = {
        "snapshots": len(keys),
        "first_ns": keys[0] if keys else None,
        "last_ns": keys[-1] if keys else None,
        "bytes": path.stat().st_size,
        "hosts": sorted(hosts),
    }
    return Description(
        str(path), "history", version, facts, tuple(_damage("history-damaged", path, why) for why in damage)
    )


def _database(path: Path) -> Description:
    import sqlite3

    from memconsole.backend import database

    try:
        with contextlib.closing(database.looked_at(path)) as found:
            if database.number(found, "application_id") == store.APPLICATION:
                return _history(path, found)
            return _audit(path, found)
    except sqlite3.Error as error:
        raise BadFile(
            f"{path} is neither a history nor an audit trail, or is damaged", str(error), "choose another file"
        ) from None


def _history(path: Path, found: sqlite3.Connection) -> Description:
    """Every chapter of a history, each as far as it goes."""
    import sqlite3

    store.check(found, path)
    hosts: set[str] = set()
    keys: list[int] = []
    damage = []
    pfn_maps = 0
    try:
        damage += [row[0] for row in found.execute("PRAGMA integrity_check(1)") if row[0] != "ok"]
        bounds = found.execute("SELECT chapter, min(key), max(key) FROM frames GROUP BY chapter ORDER BY 2").fetchall()
        for start, first, last in bounds:
            chapter = store.Chapter(start)
            try:
                for key, payload in store.frames(found, first, last, start):
                    text = chapter.text(key, payload, f"the frame of {key} in {path}")
                    if not chapter.frames:
                        hosts.add(_host(text, f"the frame of {key} in {path}"))
                    chapter.append(key, text)
                    keys.append(key)
            except BadFile as error:
                damage.append(str(error))
        pfn_maps, spoilt = maps.damage(found, path)
        damage += spoilt
    except sqlite3.Error as error:
        damage.append(str(error))
    described = _recorded(path, store.VERSION, keys, hosts, damage)
    return msgspec.structs.replace(described, facts={**described.facts, "pfn_maps": pfn_maps})


def _audit(path: Path, found: sqlite3.Connection) -> Description:
    from memconsole.backend import database
    from memconsole.backend.ledger import trail

    version = database.number(found, "user_version")
    database.check_table(found, "records", path)
    if version != trail.VERSION:
        raise BadFile(
            f"{path} is of version {version}",
            f"this memconsole knows version {trail.VERSION}",
            "use the newer memconsole",
        )
    checked = [row[0] for row in found.execute("PRAGMA integrity_check")]
    rows, first, last = found.execute("SELECT count(*), min(at_ns), max(at_ns) FROM records").fetchone()
    chains = [row[0] for row in found.execute("SELECT DISTINCT chain FROM records ORDER BY chain")]
    facts = {"records": rows, "first_ns": first, "last_ns": last, "chains": chains}
    findings = (_damage("audit-damaged", path, why) for why in checked if why != "ok")
    return Description(str(path), "audit", version, facts, tuple(findings))


def describe_kernel() -> Description:
    """What the kernel that runs was handed, and will hand over at its next jump; what is not to be read is a gap of it.

    Raises:
        NotFound: it has no KHO. Denied: its memory cannot be read.
    """
    from memconsole.backend.kernel import census, handover, kho
    from memconsole.backend.kernel.handover import outgoing

    here = kho.survival()
    if not here.kho:
        raise NotFound("this kernel hands nothing over", here.detail, "memconsole inspect FILE reads a file")
    found = [handover.live("out")]
    with contextlib.suppress(NotFound):  # it was not booted through KHO
        found.append(handover.live("in"))
    facts = _facts(found)
    facts["sessions"] = [
        {"session": each.name, "held_by": ",".join(map(str, each.holders))} for each in outgoing.sessions(census.take())
    ]
    facts["not_shown"] = [
        {"root": each.side, "what": gap.source, "why": gap.why} for each in found for gap in each.gaps
    ]
    return Description("this kernel", "handover", int(found[0].compatible.rpartition("-v")[2]), facts)


def _handover(path: Path) -> Description:
    """A dump of a kernel's memory, or a root FDT of KHO: what was handed over in it; ``root`` tells several apart."""
    from memconsole.backend.kernel import handover

    found = handover.describe(str(path))
    findings = (_damage("handover-torn", path, f"{gap.source}: {gap.why}") for each in found for gap in each.gaps)
    version = int(found[0].compatible.rpartition("-v")[2])
    return Description(str(path), "handover", version, _facts(found), tuple(findings))


def _facts(found: Sequence[Handover]) -> dict[str, Any]:
    return {
        "handovers": [
            {
                "root": each.side,
                "abi": each.compatible,
                "from": each.metadata.previous_release if each.metadata else None,
                "kexec_count": each.metadata.kexec_count if each.metadata else None,
                "liveupdate_number": each.luo.liveupdate_number if each.luo else None,
                "preserved_pages": each.preserved.pages if each.preserved else None,
                "preserved_runs": len(each.preserved.runs) if each.preserved else None,
            }
            for each in found
        ],
        "blobs": [{"root": each.side, **msgspec.to_builtins(blob)} for each in found for blob in each.blobs],
        "files": [
            {
                "root": each.side,
                "session": session.name,
                "token": file.token,
                "abi": file.compatible,
                "size": file.memfd.size if file.memfd else None,
                "folios": file.memfd.folios if file.memfd else None,
                "extents": len(file.memfd.extents) if file.memfd else None,
            }
            for each in found
            if each.luo is not None
            for session in each.luo.sessions
            for file in session.files
        ],
    }


def _snapshot(path: Path, name: str) -> Description:
    from memconsole import recording

    snapshot, tables = recording.read(path, name)
    for table in tables.values():
        table.close()
    counted = {name: len(getattr(snapshot, name)) for name in ("regions", "guests", "grants", "windows", "domains")}
    facts = {
        "host": snapshot.host.name,
        "kernel": snapshot.host.kernel,
        "taken_ns": snapshot.taken_ns,
        "tool": snapshot.host.tool,
        **counted,
        "findings": [msgspec.to_builtins(finding) for finding in snapshot.findings],
        "tables": [{"key": ref.key, "rows": ref.rows, "page_size": ref.page_size} for ref in snapshot.tables],
    }
    return Description(str(path), "snapshot", snapshot.version, facts)


def _damage(id: str, path: Path, why: str) -> Finding:
    remedy = "use what stands before the damage"
    return Finding(id, Severity.WARNING, path.name, f"{path.name} is damaged: {why}", str(path), remedy)
