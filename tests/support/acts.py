"""What a person does at the console, act by act: tests do it quickly, ``make tour`` slowly."""

from __future__ import annotations

from collections.abc import Callable

from support.person import Person
from support.services import Service

Act = Callable[[Person, Service], None]


def looks_around(person: Person, service: Service) -> None:
    """The views by keys, and a guest by the mouse."""
    del service
    person.caption("the overview: is this host ready, and if not, why?")
    person.sees("Overview", "canary-a", "canary-b")
    person.caption("guests; Enter opens one")
    person.presses("3")
    person.sees("Beats", "canary-b")  # a column of this view: the names stand in the Overview, too, which is left
    person.commands("guests canary-")
    person.sees("/canary-", "canary-b")
    person.clicks("canary-b")
    person.presses("enter")
    person.sees("guest canary-b")
    person.presses("escape")  # a key right behind it would be one with Alt
    person.sees_no_more("guest canary-b")
    person.presses("2")
    person.sees("Store", "canary-a")


def makes_and_revokes(person: Person, service: Service) -> None:
    """A region is reserved, mapped and taken back; every step shows its plan first."""
    del service
    person.caption("a region is reserved: the plan first, then Enter")
    person.commands("reserve extra 16M")
    person.sees("memconsole reserve extra 16M", "undo:", "Apply")
    person.presses("enter")
    person.sees("region extra is reserved")
    person.caption("a guest maps it")
    person.commands("map extra canary-a --gpa 1G")
    person.sees("offer 16M of extra", "Apply")
    person.presses("enter")
    grant = person.finds(r"canary-a maps 16M of extra \(rw\)\s+as\s+(g\d+)")
    person.caption("and it is taken back; what destroys wants a typed name")
    person.commands(f"revoke {grant}")
    person.confirms()
    person.sees("Revoke grant in")


def rehearses(person: Person, service: Service) -> None:
    """A handoff without the jump: every VMM is restarted on the same memory."""
    del service
    person.caption("a handoff is rehearsed: every VMM restarts on the same memory")
    person.presses("0")
    person.commands("handoff rehearse")
    person.sees("type")
    person.confirms()
    person.sees("Rehearse handoff in")


def travels(person: Person, service: Service) -> None:
    """What was recorded is walked through, and left again."""
    del service
    person.caption("the past: [ goes back, } returns")
    person.presses("3", "[")
    person.sees("PAST")
    person.presses("}")
    person.sees_no_more("PAST")


def loses_the_service(person: Person, service: Service) -> None:
    """The control process is killed; guests run on, the console says so, and finds the next one by itself."""
    person.caption("the service is killed: the memory outlives it, and the console says what it cannot see")
    assert service.process is not None
    service.process.kill()
    service.process.communicate()
    person.sees("no control process answers")
    person.caption("another one starts, and takes over what custody holds")
    service.start("--record", "0.5")
    person.sees_no_more("no control process answers")
    person.sees("canary-a")


ACTS: tuple[Act, ...] = (looks_around, makes_and_revokes, rehearses, travels, loses_the_service)
