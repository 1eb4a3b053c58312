"""What undoes an action: the action the registry has for it, or the reason why there is none."""

from __future__ import annotations

import pytest
from msgspec.structs import replace
from support import synthetic

from memconsole import action_input, actions
from memconsole.actions import Action
from memconsole.model import Access, Outcome
from memconsole.undoing import inverse

BEFORE = synthetic.snapshot()
GRANT = BEFORE.grants[0]


def done(action: Action, subject: str = "") -> Outcome:
    return Outcome(action.spec.id, subject, "")


@pytest.mark.parametrize(
    ("action", "subject", "undone"),
    [
        (actions.Reserve("a", 4096), "a", actions.Release("a")),
        (actions.Map("a", "b"), "g7", actions.Revoke("g7")),
        (actions.GuestStart("a"), "a", actions.GuestStop("a")),
        (actions.GuestAttach("a", 7), "a", actions.GuestStop("a")),
        (actions.GuestPause("a"), "a", actions.GuestResume("a")),
        (actions.GuestResume("a"), "a", actions.GuestPause("a")),
        (
            actions.Move(BEFORE.regions[0].name, "dax"),
            "",
            actions.Move(BEFORE.regions[0].name, BEFORE.regions[0].store),
        ),
        (actions.WindowMap("0000:00:04.0:0", "a"), "", actions.WindowRevoke("0000:00:04.0:0")),
        (
            actions.Revoke(GRANT.id),
            GRANT.id,
            actions.Map(GRANT.region, GRANT.guest, 0, GRANT.length, GRANT.gpa, Access.RW, GRANT.dma, GRANT.lazy),
        ),
    ],
    ids=lambda value: value.spec.id if isinstance(value, Action) else "",
)
def test_an_action_is_undone_by_another(action: Action, subject: str, undone: Action) -> None:
    assert inverse(action, done(action, subject), BEFORE) == undone


@pytest.mark.parametrize("id", sorted(actions.REGISTRY))
def test_every_action_of_the_registry_has_an_inverse_or_a_reason(id: str) -> None:
    cls = actions.REGISTRY[id]
    texts = {
        field.name: {"integer": "1", "size": "4K", "address": "0", "bdf": "0000:00:04.0"}.get(field.arg.kind.value, "a")
        for field in actions.fields(cls)
        if field.required
    }
    found = inverse(action_input.build(id, texts), Outcome(id, "a", ""), None)
    assert isinstance(found, Action) or found


def test_a_window_goes_back_to_the_guest_that_had_it() -> None:
    window, *others = BEFORE.windows
    before = replace(BEFORE, windows=(replace(window, guest="web0"), *others))
    action = actions.WindowRevoke(window.id)
    assert inverse(action, done(action), before) == actions.WindowMap(window.id, "web0")
