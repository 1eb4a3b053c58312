"""Who is asked and hangs holds up a thread of its own and nobody else; what it last said stays, with its time."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator

import pytest
from support.waiting import until

from memconsole.backend.peers.asked import Polled, Poller
from memconsole.backend.ticks import Ticks
from memconsole.errors import GuestError

LONG_S = 60.0


class One:
    """One who answers with how often it was asked; it hangs until ``goes_on`` is set, and refuses with ``why``."""

    def __init__(self) -> None:
        self.asked = 0
        self.why: Exception | None = None
        self.goes_on = threading.Event()
        self.goes_on.set()
        self.hangs = threading.Event()

    def __call__(self) -> int:
        self.asked += 1
        mine = self.asked
        if not self.goes_on.is_set():
            self.hangs.set()
            assert self.goes_on.wait(LONG_S)
        if self.why is not None:
            raise self.why
        return mine


@pytest.fixture
def one() -> One:
    return One()


@pytest.fixture
def asked(one: One) -> Iterator[Poller[int]]:
    made = Poller("one", one)
    yield made
    one.goes_on.set()
    made.end()
    until(lambda: not threads(), "its thread ends")


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name == "memconsole-one"]


def ask(asked: Poller[int], within: float = LONG_S) -> Polled[int]:
    return asked.poll(asked.begin(), time.monotonic() + within)


def test_an_answer_comes_with_its_time(asked: Poller[int]) -> None:
    before = time.time_ns()
    heard = ask(asked)
    assert (heard.answer, heard.why) == (1, "")
    assert heard.at_ns is not None
    assert before <= heard.at_ns <= time.time_ns()
    assert ask(asked).answer == 2


def test_one_that_hangs_costs_one_thread_and_its_last_answer_stays(asked: Poller[int], one: One) -> None:
    first = ask(asked)
    one.goes_on.clear()
    asked.begin()
    assert one.hangs.wait(LONG_S)
    for _ in range(50):
        heard = ask(asked, 0.0)
        assert (heard.answer, heard.at_ns) == (first.answer, first.at_ns)
        assert heard.why.startswith("no answer for ")
    assert len(threads()) == 1
    assert one.asked == 2
    one.goes_on.set()
    until(lambda: not ask(asked).why, "it answers again")


def test_an_answer_to_an_earlier_question_is_not_taken_for_that_of_a_later_one(asked: Poller[int], one: One) -> None:
    one.goes_on.clear()
    asked.begin()
    assert one.hangs.wait(LONG_S)
    later = asked.begin()  # asked while the first is under way: what that says may be old by then
    one.goes_on.set()
    assert asked.poll(later, time.monotonic() + LONG_S).answer == 2


@pytest.mark.parametrize(
    ("error", "why"),
    [
        (GuestError("guest c does not answer", "said nothing"), "guest c does not answer: said nothing"),
        (KeyError("x"), "KeyError: 'x'"),
    ],
    ids=["foreseen", "unforeseen"],
)
def test_an_error_is_why_there_is_no_newer_answer(asked: Poller[int], one: One, error: Exception, why: str) -> None:
    first = ask(asked)
    one.why = error
    heard = ask(asked)
    assert heard[:2] == first[:2]
    assert why in heard.why
    one.why = None
    assert ask(asked).why == ""


def test_one_that_never_answered_has_no_time(asked: Poller[int], one: One) -> None:
    one.why = GuestError("nobody there")
    assert ask(asked) == Polled(None, None, "nobody there")


@pytest.mark.parametrize("busy", [False, True], ids=["idle", "under way"])
def test_what_is_asked_is_let_go_once_no_question_is_under_way(asked: Poller[int], one: One, busy: bool) -> None:
    ended: list[str] = []
    ask(asked)
    if busy:
        one.goes_on.clear()
        asked.begin()
        assert one.hangs.wait(LONG_S)
    asked.end(lambda: ended.append("let go"))
    assert ended == ([] if busy else ["let go"])
    one.goes_on.set()
    until(lambda: ended == ["let go"], "it is let go")
    asked.begin()
    assert asked.poll(99, time.monotonic() + LONG_S).answer is not None  # who asks now waits for nobody


# --- ticks --------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def ticks() -> Iterator[Callable[[str, Callable[[], None]], None]]:
    made = Ticks()
    try:
        yield lambda name, job: made.begin(name, 0.01, job)
    finally:
        made.close()


def test_a_job_that_hangs_or_fails_holds_up_no_other(caplog: pytest.LogCaptureFixture) -> None:
    done = {"hangs": 0, "fails": 0, "breaks": 0, "works": 0}
    goes_on = threading.Event()

    def job(name: str, then: Callable[[], object]) -> Callable[[], None]:
        def run() -> None:
            done[name] += 1
            then()

        return run

    def fails() -> None:
        raise GuestError("the same each time")

    def breaks() -> None:
        raise KeyError("unforeseen")

    with ticks() as begin:
        begin("hangs", job("hangs", lambda: goes_on.wait(LONG_S)))
        begin("fails", job("fails", fails))
        begin("breaks", job("breaks", breaks))
        begin("works", job("works", lambda: None))
        until(lambda: min(done["fails"], done["breaks"], done["works"]) > 3, "the others go on")
        assert done["hangs"] == 1
        goes_on.set()
    after = dict(done)
    assert done == after
    assert [each.getMessage() for each in caplog.records].count("fails: the same each time") == 1
