"""One action on many: each has its own plan, and what fails on one keeps no other."""

from __future__ import annotations

from collections.abc import Sequence

from support import synthetic

from memconsole import bulk
from memconsole.actions import Action, Release
from memconsole.errors import Gone
from memconsole.model import Outcome, Plan, Refusal


class Host(synthetic.SyntheticSource):
    """A source that refuses one region, and fails on another."""

    def plan(self, action: Action, after: Sequence[Action] = ()) -> Plan:
        self.refuse = (Refusal("Granted", "it is granted"),) if action == Release("granted") else ()
        return super().plan(action, after)

    def apply(self, action: Action) -> Outcome:
        if action == Release("broken"):
            raise Gone("its process ended", "", "try again")
        return super().apply(action)


def test_what_is_refused_is_not_applied_and_what_fails_keeps_no_other() -> None:
    host = Host()
    many = [Release(name) for name in ("a", "granted", "broken", "b")]
    planned = list(bulk.plans(host, many))
    assert [item.refused for item in planned] == [False, True, False, False]
    told: list[bulk.BulkItem] = []
    done = bulk.applied(host, planned, told.append)
    assert host.applied == [Release("a"), Release("b")]
    assert [item.action for item in done] == [Release("a"), Release("broken"), Release("b")] == [i.action for i in told]
    assert bulk.rest(done) == [Release("broken")]
    assert done[1].error is not None
    assert done[1].error.remedy == "try again"


def test_a_plan_that_cannot_be_made_is_refused_by_name() -> None:
    host = synthetic.SyntheticSource()
    host.fail["plan"] = Gone("the control process ended")
    (item,) = bulk.plans(host, [Release("a")])
    assert item.refused
    assert item.plan.refusals[0].what == "the control process ended"
