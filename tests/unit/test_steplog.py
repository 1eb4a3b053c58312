"""The log of steps: each with its time and how it ended, and an error that ends nothing is told once."""

from __future__ import annotations

import json
import logging
import threading

import pytest

from memconsole.backend import serve, steplog, steps
from memconsole.backend.steps import Step
from memconsole.errors import Gone, GuestError, MemconsoleError


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO, "memconsole.steps")
    return caplog


def fails(error: BaseException) -> None:
    raise error


def lines(said: pytest.LogCaptureFixture) -> list[str]:
    """The lines without their times; a time that is none shows."""
    words = [record.getMessage().split(" ") for record in said.records]
    for line in words:
        for at, word in enumerate(line):
            if word.startswith("seconds="):
                assert float(word.removeprefix("seconds=")) >= 0
                line[at] = "seconds"
    return [" ".join(line) for line in words]


def test_every_step_is_named_with_its_time_and_how_it_ended(said: pytest.LogCaptureFixture) -> None:
    gone = GuestError("guest web does not answer", "it is stopped", "kill -CONT")
    why = json.dumps(str(gone))  # as it is when it is logged: what was not undone is added afterwards
    made = [
        Step("load", "load it", lambda: None, lambda: None, "unload it"),
        Step("pause-web", "stop web", lambda: None, lambda: fails(Gone("web ended")), "let it go on"),
        Step("save-web", "save web", lambda: fails(gone)),
    ]
    with pytest.raises(GuestError):
        list(steps.run("handoff-run", made))
    assert lines(said) == [
        'step action=handoff-run step=load state=begins does="load it"',
        "step action=handoff-run step=load state=done seconds",
        'step action=handoff-run step=pause-web state=begins does="stop web"',
        "step action=handoff-run step=pause-web state=done seconds",
        'step action=handoff-run step=save-web state=begins does="save web"',
        f"step action=handoff-run step=save-web state=failed seconds error=Guest why={why}",
        'step action=handoff-run step=pause-web state=undoes does="let it go on"',
        'step action=handoff-run step=pause-web state=not-undone seconds error=Gone why="web ended"',
        'step action=handoff-run step=load state=undoes does="unload it"',
        "step action=handoff-run step=load state=undone seconds",
    ]
    assert [record.levelno for record in said.records if record.levelno > logging.INFO] == [logging.WARNING] * 2


def test_a_point_inside_of_a_step_has_its_time(said: pytest.LogCaptureFixture) -> None:
    with steplog.running("adopt"):
        steps.passed("adopt.guest.web")
    steps.passed("adopt.done")
    assert lines(said) == [
        "step action=adopt step=guest.web state=passed seconds",
        "step action=adopt step=done state=passed",
    ]


def test_a_suppressed_error_is_told_once_an_action(said: pytest.LogCaptureFixture) -> None:
    def climb() -> None:
        for _ in range(50):
            with steplog.suppressed("web goes on", MemconsoleError):
                fails(Gone("web ended"))
        with steplog.suppressed("web goes on", MemconsoleError):
            fails(Gone("web ended otherwise"))

    for _ in range(2):
        list(steps.run("revoke", [Step("copy", "copy it", climb)]))
    told = [line for line in lines(said) if line.startswith("suppressed")]
    assert (
        told
        == [
            'suppressed action=revoke step=copy during="web goes on" error=Gone why="web ended"',
            'suppressed action=revoke step=copy during="web goes on" error=Gone why="web ended otherwise"',
        ]
        * 2
    )


def test_an_error_of_another_kind_is_not_suppressed(said: pytest.LogCaptureFixture) -> None:
    with pytest.raises(OSError, match="no"), steplog.suppressed("it is tried", MemconsoleError):
        fails(OSError("no"))
    assert not said.records


def test_what_another_thread_does_is_no_part_of_the_action(said: pytest.LogCaptureFixture) -> None:
    def work() -> None:
        with steplog.suppressed("the clock is noted", OSError):
            fails(OSError("no"))

    with steplog.running("adopt"):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert lines(said) == ['suppressed during="the clock is noted" error=OSError why=no']


def test_a_line_stays_one_line_whatever_is_in_it(said: pytest.LogCaptureFixture) -> None:
    list(steps.run("map", [Step("map", 'of "a"\nstep action=x', lambda: None)]))
    assert lines(said)[0] == r'step action=map step=map state=begins does="of \"a\"\nstep action=x"'


def test_steps_of_a_step_belong_to_the_action_that_began(said: pytest.LogCaptureFixture) -> None:
    def inner() -> None:
        list(steps.run("handoff-rehearse", [Step("end", "end it", lambda: None)]))
        with steplog.suppressed("it is tidied", OSError):
            fails(OSError("no"))

    list(steps.run("adopt", [Step("finish", "finish it", inner)]))
    assert lines(said)[3] == 'suppressed action=adopt step=finish during="it is tidied" error=OSError why=no'


def test_a_line_of_the_service_has_its_time_unless_the_journal_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    record = logging.LogRecord("memconsole.steps", logging.WARNING, "", 0, "step action=%s", ("adopt",), None)
    record.created = 1_790_000_000.25
    formatter = serve._Priority("%(message)s")
    monkeypatch.delenv("JOURNAL_STREAM", raising=False)
    assert formatter.format(record) == "2026-09-21T14:13:20.250+00:00 memconsole: warning: step action=adopt"
    monkeypatch.setenv("JOURNAL_STREAM", "8:1")
    assert formatter.format(record) == "<4>step action=adopt"
