"""What a file of ours is and whether it is whole: snapshots, ledger images, history files, audit trails, handovers.

Nothing is written and no control process is needed. A ledger's image is read from whoever holds its memfd, for example
``/proc/$(pgrep mc-keeper)/fd/N``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from memconsole.backend import history, ledger
from memconsole.errors import BadFile, NotFound
from memconsole.model import Finding, Severity, Value

if TYPE_CHECKING:
    from memconsole.backend.kernel.handover.values import Handover


class Description(Value, frozen=True):
    """What a file is: its kind, format version, facts by name, and what is wrong with it (nothing if it is whole)."""

    file: str
    kind: str
    version: int
    facts: dict[str, Any]
    findings: tuple[Finding, ...] = ()


def describe(path: Path) -> Description:
    """What a file is, from its first bytes, after all its checksums were checked.

    Raises:
        BadFile: it cannot be read, is none of ours, of a newer version, or too damaged to say anything.
    """
    try:
        with path.open("rb") as file:
            start = file.read(16)
            file.seek(4096)
            second = file.read(8)
    except OSError as error:
        raise BadFile(f"{path} cannot be read", error.strerror or str(error)) from None
    if ledger.MAGIC in {start[:8], second}:
        return _ledger(path)
    if start[:8] == history.MAGIC:
        return _history(path)
    if start == b"SQLite format 3\0":
        return _audit(path)
    if start.startswith((b"\x7fELF", b"\xd0\x0d\xfe\xed")):
        return _handover(path)
    return _snapshot(path)


def _ledger(path: Path) -> Description:
    image = ledger.read(path.read_bytes())
    block = image.superblock
    return Description(
        str(path),
        "ledger",
        ledger.VERSION,
        {
            "chain": block.chain,
            "generation": block.generation,
            "bytes_used": image.end - block.start,
            "bytes_capacity": block.capacity,
            "records": [_record(record) for record in image.records],
        },
        (image.dropped.finding(),) if image.dropped is not None else (),
    )


def _record(record: ledger.Record) -> dict[str, Any]:
    try:
        shown = record.value()
    except BadFile:
        shown = record.payload.hex()
    kind = ledger.Kind(record.kind).name.lower() if record.kind in ledger.Kind.__members__.values() else record.kind
    return {"seq": record.seq, "kind": kind, "payload": shown}


def _history(path: Path) -> Description:
    index = history.read_index(path)
    damage = [index.damage] if index.damage else []
    replay = history.Replay(path)
    hosts = set()
    whole = 0
    try:
        for position in range(len(index.frames)):
            hosts.add(replay.advance(index.frames[: position + 1])["host"]["name"])
            whole += 1
    except BadFile as error:
        damage.append(str(error))
    keys = [frame.key for frame in index.frames]
    facts = {
        "snapshots": whole,
        "first_ns": keys[0] if whole else None,
        "last_ns": keys[whole - 1] if whole else None,
        "bytes": index.size,
        "hosts": sorted(hosts),
    }
    findings = (_damage("history-damaged", path, why) for why in damage)
    return Description(str(path), "history", history.VERSION, facts, tuple(findings))


def _audit(path: Path) -> Description:
    import sqlite3

    from memconsole.backend import audit

    try:
        database = sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)
        try:
            (version,) = database.execute("PRAGMA user_version").fetchone()
            checked = [row[0] for row in database.execute("PRAGMA integrity_check")]
            rows, first, last = database.execute("SELECT count(*), min(at_ns), max(at_ns) FROM records").fetchone()
            chains = [row[0] for row in database.execute("SELECT DISTINCT chain FROM records ORDER BY chain")]
        finally:
            database.close()
    except sqlite3.Error as error:
        raise BadFile(f"{path} is no audit trail, or is damaged", str(error)) from None
    if version != audit.VERSION:
        raise BadFile(
            f"{path} is of version {version}", f"this memconsole knows version {audit.VERSION}", "use the newer one"
        )
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


def _snapshot(path: Path) -> Description:
    from memconsole import recording

    snapshot, tables = recording.read(path)
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
    remedy = "what stands before the damage can be believed"
    return Finding(id, Severity.WARNING, path.name, f"the file is damaged: {why}", str(path), remedy)
