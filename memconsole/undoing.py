"""What undoes an action that was done: another action, where the registry has one that does."""

from __future__ import annotations

from memconsole import actions
from memconsole.actions import Action
from memconsole.model import Grant, Outcome, Snapshot

_NEVER = {
    "release": "its contents are gone",
    "guest-stop": "its processes have ended",
    "guest-helper": "no action takes a helper's name away; it ends with its process",
    "arena-create": "what the range held is gone",
    "arena-grow": "what is said of a range is not unsaid",
    "arena-remove": "what the arena held is gone",
    "arena-scan": "what was taken up stays until it is released",
    "guest-let-go": "adopt it again: memconsole guest adopt NAME",
    "handoff-run": "the next kernel runs",
    "handoff-rehearse": "it left everything as it was",
}

_OF_USERS = "its owner may use the file by now: revoke its grant, then memconsole release {}"
_ONE_WAY = {"devdax", "raw"}


def inverse(action: Action, outcome: Outcome, before: Snapshot | None) -> Action | str:
    """The action that undoes another one, or why none does; ``before`` is what was there when it was applied."""
    if isinstance(action, actions.Reserve):
        return actions.Release(action.name) if not action.path else _OF_USERS.format(action.name)
    if isinstance(action, actions.Map):
        return actions.Revoke(outcome.subject)
    if isinstance(action, actions.GuestStart | actions.GuestAttach | actions.GuestService):
        return actions.GuestStop(action.name)
    if isinstance(action, actions.GuestAdopt):
        return "it adopted several: let each of them go" if action.all else actions.GuestLetGo(outcome.subject)
    if isinstance(action, actions.Move):
        return _moved_back(action, before)
    if isinstance(action, actions.GuestPause | actions.GuestResume):
        other = actions.GuestResume if isinstance(action, actions.GuestPause) else actions.GuestPause
        return other(action.name)
    if isinstance(action, actions.WindowMap):
        return actions.WindowRevoke(action.window)
    if isinstance(action, actions.Revoke):
        grants = before.grants if before is not None else ()
        grant = next((each for each in grants if each.id == action.grant), None)
        return _granted_again(grant) if grant is not None else "it is not known any more what it granted"
    if isinstance(action, actions.WindowRevoke):
        windows = before.windows if before is not None else ()
        guest = next((each.guest for each in windows if each.id == action.window), None)
        return actions.WindowMap(action.window, guest) if guest else "it is not known any more whose it was"
    return _NEVER[action.spec.id]


def _moved_back(action: actions.Move, before: Snapshot | None) -> Action | str:
    regions = before.regions if before is not None else ()
    store = next((each.store for each in regions if each.name == action.region), None)
    if store in _ONE_WAY:
        return f"nothing goes to the {store} store: who has a descriptor of another region there could reach it"
    return actions.Move(action.region, store) if store else "it is not known any more where it was"


def _granted_again(grant: Grant) -> Action:
    return actions.Map(
        grant.region, grant.guest, grant.offset, grant.length, grant.gpa, grant.access, grant.dma, grant.lazy
    )
