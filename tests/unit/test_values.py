"""Units, actions and errors: what people write is what is meant, both ways."""

from __future__ import annotations

import shlex

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memconsole import action_input, actions, command, units
from memconsole.arguments import write_value
from memconsole.errors import Denied, KernelRefused, NotFound, UsageError
from memconsole.model import Access, Rung


@given(st.integers(0, 1 << 61))
def test_exact_size_reads_back(value: int) -> None:
    assert units.parse_size(units.exact_size(value)) == value


@pytest.mark.parametrize(
    ("text", "value"),
    [("64M", 64 << 20), ("2GiB", 2 << 30), ("1.5k", 1536), ("0x1000", 4096), ("0", 0), (" 7 ", 7), ("1T", 1 << 40)],
)
def test_sizes(text: str, value: int) -> None:
    assert units.parse_size(text) == value


@pytest.mark.parametrize("text", ["", "-1", "M", "1.0001K", "12Q", "1e9", "9999999P", "0x"])
def test_sizes_that_mean_nothing_are_usage_errors(text: str) -> None:
    with pytest.raises(UsageError):
        units.parse_size(text)


@pytest.mark.parametrize(
    ("ns", "text"), [(0, "0ns"), (1500, "1.5us"), (3_100_000, "3.1ms"), (125_000_000_000, "2m05s"), (10**15, "11d13h")]
)
def test_durations(ns: int, text: str) -> None:
    assert units.format_duration(ns) == text


def test_bdf_gets_its_domain() -> None:
    assert units.parse_bdf("00:04.0") == "0000:00:04.0"
    with pytest.raises(UsageError):
        units.parse_bdf("4.0")


EXAMPLES = [
    actions.Reserve("web", 64 << 20, page_size=2 << 20, prefault=True),
    actions.Map("web", "db1", gpa=1 << 20, access=Access.RO),
    actions.Revoke("g1", within=0.5, at_most=Rung.ASK),
    actions.GuestStart("vm", vmm="qemu", args=("-device", "edu,addr=4")),
    actions.GuestAttach("db1", pid=42),
    actions.WindowMap("0000:00:04.0:0", "vm"),
]


@pytest.mark.parametrize("action", EXAMPLES, ids=lambda action: action.spec.id)
def test_an_action_survives_the_wire(action: actions.Action) -> None:
    assert action_input.decode(action_input.encode(action)) == action


@pytest.mark.parametrize("action", EXAMPLES, ids=lambda action: action.spec.id)
def test_an_action_survives_being_written_by_a_person(action: actions.Action) -> None:
    texts = {
        field.name: write_value(field, value)
        for field in actions.fields(type(action))
        if (value := getattr(action, field.name)) is not None
    }
    assert action_input.build(action.spec.id, texts) == action


def test_the_cli_form_is_one_shell_line() -> None:
    words = shlex.split(actions.cli_form(EXAMPLES[3]))
    assert words == ["memconsole", "guest", "start", "vm", "--vmm", "qemu", "--", "-device", "edu,addr=4"]


def test_unknown_actions_and_arguments_are_named() -> None:
    with pytest.raises(UsageError, match="explode"):
        action_input.build("explode", {})
    with pytest.raises(UsageError, match="nam"):
        action_input.build("reserve", {"nam": "x"})
    with pytest.raises(UsageError, match="lacks"):
        action_input.build("reserve", {"name": "x"})
    with pytest.raises(UsageError):
        action_input.build("guest-attach", {"name": "x", "pid": "many"})


def test_keys_do_not_collide_within_a_view() -> None:
    seen: set[tuple[str, str]] = set()
    for cls in actions.REGISTRY.values():
        if not cls.spec.key:
            continue
        assert (cls.spec.on, cls.spec.key) not in seen
        seen.add((cls.spec.on, cls.spec.key))


@pytest.mark.parametrize("action", EXAMPLES, ids=lambda action: action.spec.id)
def test_the_cli_form_is_read_back(action: actions.Action) -> None:
    assert command.parse(shlex.split(actions.cli_form(action))) == action


@pytest.mark.parametrize(
    "line", ["", "explode", "reserve web", "reserve web -5M", "reserve web 64M --store tape", "revoke g1 -- x", "guest"]
)
def test_command_words_that_mean_nothing_are_usage_errors(line: str) -> None:
    with pytest.raises(UsageError):
        command.parse(shlex.split(line))


def test_a_time_may_have_the_mark_that_tells_it_from_a_file() -> None:
    now = 1_790_000_000_000_000_000
    for text in ("-1h", "14:03:12", "2026-09-21T14:03:12"):
        assert units.parse_time(f"@{text}", now) == units.parse_time(text, now)


@pytest.mark.parametrize(
    ("uid", "told"), [(1000, "run as root (CAP_SYS_PTRACE)"), (0, "give the process CAP_SYS_PTRACE")]
)
def test_root_is_not_told_to_run_as_root(monkeypatch: pytest.MonkeyPatch, uid: int, told: str) -> None:
    monkeypatch.setattr("os.geteuid", lambda: uid)
    remedy = "run as root (CAP_SYS_PTRACE)"
    for error in (Denied("hidden", "", remedy), NotFound("hidden", "", remedy), KernelRefused("x", 1, remedy=remedy)):
        assert error.remedy.startswith(told)
    assert Denied("hidden", "", "ask an operator").remedy == "ask an operator"
