"""What a control process says of its own custody."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import pytest

from memconsole.backend import own_findings
from memconsole.backend.custody.holder import KeeperStatus, OwnCustody
from memconsole.errors import Gone


class Weak(OwnCustody):
    """Custody of a keeper that runs, and of which things are known."""

    label = "keeper, pid 7"

    def __init__(self, missing: list[str], lost: tuple[str, ...] = (), ended: str = "") -> None:
        super().__init__()
        self.missing, self.lost, self.ended = missing, lost, ended

    def check(self) -> None:
        """Whether it is there."""
        if self.ended:
            raise Gone(self.ended)

    def unguarded(self) -> list[str]:
        """What it lacks."""
        return self.missing


@dataclass(frozen=True)
class Holding:
    custody: Weak


def found(custody: Weak) -> list[str]:
    made = own_findings.custody_findings(cast("Any", Holding(custody)))
    assert all(each.observed and each.remedy and each.risk and each.requirement for each in made)
    return [each.id for each in made]


@pytest.mark.parametrize(
    ("guards", "missing"),
    [
        (7, []),
        (3, []),
        (6, ["it is not exempt from the OOM killer"]),
        (5, ["it is not locked in memory"]),
        (0, ["it is not exempt from the OOM killer", "it is not locked in memory"]),
    ],
)
def test_a_keeper_that_is_not_protected_is_a_finding(guards: int, missing: list[str]) -> None:
    status = KeeperStatus(pid=7, held=1, room=100, clients=1, bytes=10, bytes_room=100, guards=guards)
    assert status.unguarded() == missing
    assert found(Weak(missing)) == (["custody-unguarded"] if missing else [])


def test_it_stands_beside_what_else_is_wrong_and_not_in_the_place_of_it() -> None:
    assert found(Weak(["it is not locked in memory"], lost=("region:web:0",))) == ["custody-unguarded", "custody-lost"]
    assert found(Weak(["it is not locked in memory"], ended="the keeper ended")) == ["custody-gone"]
