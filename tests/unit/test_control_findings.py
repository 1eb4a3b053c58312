"""Differences become findings, each named, with a remedy; a host where all is as meant has none."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from msgspec.structs import replace
from support.synthetic import snapshot

from memconsole.backend.kernel.procmaps import Vma
from memconsole.backend.ledger import boots
from memconsole.backend.observe import findings
from memconsole.backend.observe.findings import RUNS_SLOW
from memconsole.backend.observe.mappings import RegionMapping
from memconsole.fields import TABLES
from memconsole.model import (
    Faults,
    Finding,
    GuestKind,
    GuestState,
    LiveSession,
    Progress,
    Severity,
    Snapshot,
    Survival,
)

HOST = snapshot(8, 3, findings=0)
LUO = Survival(kho=True, luo=True)


def changed(table: str, **fields: object) -> Snapshot:
    """The host with the first entity of a table changed; ``seen__x`` changes what is seen of it."""
    first, *rest = getattr(HOST, table)
    seen = {name.removeprefix("seen__"): value for name, value in fields.items() if name.startswith("seen__")}
    plain = {name: value for name, value in fields.items() if not name.startswith("seen__")}
    if seen:
        plain["seen"] = replace(first.seen, **seen)
    return replace(HOST, **{table: (replace(first, **plain), *rest)})


def found(host: Snapshot) -> list[tuple[str, Severity, str]]:
    made = findings.find(host, [])
    assert all(finding.observed and finding.evidence and finding.remedy for finding in made)
    return [(finding.id, finding.severity, finding.subject) for finding in made]


def test_where_all_is_as_meant_nothing_is_found() -> None:
    assert found(replace(HOST, survival=Survival())) == []


REGION, GUEST, GRANT, WINDOW = HOST.regions[0].name, HOST.guests[0].name, HOST.grants[0].id, HOST.windows[0].id


@pytest.mark.parametrize(
    ("host", "id", "severity", "subject"),
    [
        (lambda: changed("regions", seen=None), "region-lost", Severity.ERROR, REGION),
        (
            lambda: replace(changed("regions", seen__runs=RUNS_SLOW + 1), survival=LUO),
            "region-fragmented",
            Severity.WARNING,
            REGION,
        ),
        (lambda: changed("grants", faults=Faults(served=False)), "faults-unserved", Severity.WARNING, GRANT),
        (lambda: changed("grants", faults=Faults(True, refused=3)), "faults-refused", Severity.WARNING, GRANT),
        (
            lambda: replace(changed("regions", page_size=2 << 20), survival=LUO),
            "region-not-preserved",
            Severity.WARNING,
            REGION,
        ),
        (
            lambda: replace(changed("regions", page_size=2 << 20, grants=()), survival=LUO),
            "region-not-preserved",
            Severity.INFO,
            REGION,
        ),
        (lambda: changed("regions", seen__moved=8192), "region-moved", Severity.INFO, REGION),
        (
            lambda: replace(
                changed("regions", seen__moved=8192),
                grants=changed("grants", region=REGION, dma="0000:00:04.0").grants,
            ),
            "region-moved",
            Severity.WARNING,
            REGION,
        ),
        (
            lambda: replace(changed("guests", kind=GuestKind.FOREIGN), survival=LUO),
            "ram-not-preserved",
            Severity.WARNING,
            GUEST,
        ),
        (lambda: changed("guests", state=GuestState.GONE), "guest-gone", Severity.WARNING, GUEST),
        (
            lambda: changed("guests", state=GuestState.GONE, ended=boots.KEXEC),
            "guest-ended",
            Severity.WARNING,
            GUEST,
        ),
        (lambda: changed("guests", state=GuestState.STOPPED), "guest-stopped", Severity.WARNING, GUEST),
        (lambda: changed("grants", seen=()), "grant-unmapped", Severity.WARNING, GRANT),
        (
            lambda: changed("windows", grant="g99", guest=GUEST, claimed="e1000"),
            "window-claimed",
            Severity.ERROR,
            WINDOW,
        ),
    ],
)
def test_a_difference_has_a_name(host: Callable[[], Snapshot], id: str, severity: Severity, subject: str) -> None:
    assert (id, severity, subject) in found(host())


def test_a_window_that_vfio_keeps_for_its_guest_is_as_meant() -> None:
    host = changed("windows", grant="g99", guest=GUEST, claimed="vfio")
    assert "window-claimed" not in [id for id, _, _ in found(host)]


def test_wrong_bytes_are_an_error() -> None:
    guest = next(guest for guest in HOST.guests if guest.progress is not None)
    assert guest.progress is not None
    wrong = replace(guest, progress=replace(guest.progress, wrong=3))
    host = replace(HOST, guests=tuple(wrong if each.name == guest.name else each for each in HOST.guests))
    assert ("guest-corrupt", Severity.ERROR, guest.name) in found(host)


def test_why_a_guest_cannot_go_on_is_in_its_own_words() -> None:
    said = Progress("kvm", 1, 2, 0, 3, 4, "the vCPU reached gpa 0x5000, where no RAM is")
    host = changed("guests", state=GuestState.STOPPED, progress=said)
    (stopped,) = [each for each in findings.find(host, []) if each.id == "guest-stopped"]
    assert stopped.evidence == "its own answer: the vCPU reached gpa 0x5000, where no RAM is"


@pytest.mark.parametrize("state", [GuestState.GONE, GuestState.SILENT])
def test_a_guest_without_a_process_has_no_number_that_is_none(state: GuestState) -> None:
    host = changed("guests", state=state, pid=None)
    told = [each for each in findings.find(host, []) if each.id in {"guest-gone", "guest-silent"}]
    assert len(told) == 1
    assert "its process" in f"{told[0].observed} {told[0].evidence}"
    assert "None" not in f"{told[0]}"


def test_findings_are_listed_errors_first_and_else_as_they_came() -> None:
    came = tuple(
        Finding(f"f{number}", severity, "web", "observed")
        for number, severity in enumerate([Severity.INFO, Severity.ERROR, Severity.WARNING, Severity.ERROR])
    )
    listed = TABLES["findings"].rows(replace(HOST, findings=came))
    assert [each.id for each in listed] == ["f1", "f3", "f2", "f0"]
    sorted_host = replace(HOST, findings=tuple(listed))
    assert TABLES["findings"].rows(sorted_host) is sorted_host.findings


def test_a_vm_of_somebody_else_is_never_missed() -> None:
    host = changed("guests", kind=GuestKind.FOREIGN, state=GuestState.GONE)
    assert "guest-gone" not in [id for id, _, _ in found(host)]


def test_a_stranger_s_mappings_of_a_region_are_one_error() -> None:
    vmas = [Vma(start, start + 4096, "rw-s", 0, 1, 5, "/memfd:x", deleted=True) for start in (0x1000, 0x8000)]
    made = findings.find(replace(HOST, survival=Survival()), [RegionMapping("web", 77, vma, 0) for vma in vmas])
    assert [(finding.id, finding.subject) for finding in made] == [("mapping-unknown", "web")]
    assert "77 maps 8K" in made[0].observed


def test_without_live_update_it_does_not_matter_how_a_region_lies() -> None:
    assert found(replace(changed("regions", seen__runs=RUNS_SLOW + 1), survival=Survival())) == []


def test_a_session_that_strangers_alone_hold_is_named() -> None:
    sessions = (
        LiveSession("memconsole:web", (5, 77), "session:memconsole:web"),
        LiveSession("memconsole:now", (5,)),
        LiveSession("other", (5, 77, 78)),
        LiveSession("systemd-pid1", (1,)),
    )
    made = findings.find(replace(HOST, survival=Survival(sessions=sessions)), [], {5})
    assert [(finding.id, finding.subject) for finding in made] == [("session-outside-custody", "other")]
    assert "process 77, 78" in made[0].observed
