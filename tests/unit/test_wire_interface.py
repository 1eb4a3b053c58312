"""What the service says is what its interface file says; other clients may write "none" in every way there is."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from support.served import Raw, ServedSource

from memconsole import action_input, errors
from memconsole.backend.wire import protocol, write_interface
from memconsole.backend.wire.call import Call
from memconsole.backend.wire.serving import serve_in_thread

# --- the interface, read as Varlink's grammar has it -------------------------------------------------------------

WORD = re.compile(r"\s*(#[^\n]*\n|->|[A-Za-z][A-Za-z0-9_.-]*|\[string\]|\[\]|[?(),:])")


SIMPLE = {"int": (int,), "bool": (bool,), "string": (str,), "float": (int, float), "object": (dict,)}


class Interface:
    """A parser of the grammar of https://varlink.org/Interface-Definition, where systemd is as strict: no container
    holds another container, or an optional value, without a name between them.
    """

    def __init__(self, text: str) -> None:
        text = re.sub(r"#[^\n]*", "", text)
        self._words = [found[1] for found in WORD.finditer(text)]
        assert "".join(self._words) == re.sub(r"\s+", "", text)
        self.types: dict[str, Any] = {}
        self.methods: dict[str, tuple[Any, Any]] = {}
        self.errors: dict[str, Any] = {}
        assert self._next() == "interface"
        self._next()
        while self._words:
            word, name = self._next(), self._next()
            taken = self._type()
            if word == "method":
                assert self._next() == "->"
                self.methods[name] = taken, self._type()
            else:
                {"type": self.types, "error": self.errors}[word][name] = taken

    def _next(self) -> str:
        return self._words.pop(0)

    def _type(self, *, inside: bool = False) -> Any:
        word = self._next()
        if word in {"?", "[]", "[string]"}:
            assert not inside, "a container in a container"
            return word, self._type(inside=word != "?")
        if word != "(":
            return word
        members: dict[str, Any] = {}
        while (name := self._next()) != ")":
            colon = self._words[0] == ":" and self._next()
            members[name] = self._type() if colon else None
            if self._words[0] == ",":
                self._next()
        return members

    def check(self, value: Any, kind: Any, at: str = "$") -> None:  # noqa: C901 - a case a kind of type
        """Fail where a value is not of a type."""
        match kind:
            case ("?", inner):
                if value is not None:
                    self.check(value, inner, at)
            case ("[]", inner):
                assert isinstance(value, list), at
                for index, item in enumerate(value):
                    self.check(item, inner, f"{at}[{index}]")
            case ("[string]", inner):
                assert isinstance(value, dict), at
                for name, item in value.items():
                    self.check(item, inner, f"{at}.{name}")
            case dict() if all(member is None for member in kind.values()):
                assert value in kind, at
            case dict():
                assert isinstance(value, dict), at
                assert value.keys() <= kind.keys(), at
                for name, inner in kind.items():
                    assert name in value or inner[0] == "?", f"{at}.{name} is missing"
                    self.check(value.get(name), inner, f"{at}.{name}")
            case _ if kind in SIMPLE:
                assert type(value) in SIMPLE[kind], at
            case _:
                self.check(value, self.types[kind], at)


@pytest.fixture(scope="module")
def interface() -> Interface:
    return Interface(protocol.description())


def test_the_types_are_those_of_the_model() -> None:
    assert (
        protocol.description().partition(write_interface.TYPES)[2].strip()
        == write_interface.generated().partition(write_interface.TYPES)[2].strip()
    )


def test_containers_in_containers_are_not_let_through() -> None:
    for bad in ("[string][]object", "[string][]string", "[][]int", "[]?int"):
        with pytest.raises(AssertionError, match="container"):
            Interface(f"interface a.b\ntype A (a: {bad})")


# --- replies ----------------------------------------------------------------------------------------------------


@pytest.fixture
def source() -> ServedSource:
    return ServedSource()


@pytest.fixture
def path(source: ServedSource) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="mc-") as directory:
        serving = serve_in_thread(source, Path(directory) / "control")
        yield Path(directory) / "control"
        serving.close()


RESERVE = {"do": "reserve", "name": "a", "size": 4096}


@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        ("Hello", {"protocol": protocol.PROTOCOL}),
        ("GetSnapshot", {}),
        ("GetExtents", {"key": "guest:db1"}),
        ("GetFrame", {"pfn": 7}),
        ("Plan", {"action": RESERVE}),
        ("Apply", {"action": RESERVE}),
        ("Events", {}),
        ("Watch", {}),
        ("History", {}),
        ("GetPast", {"at_ns": 1 << 62}),
        ("Doctor", {}),
    ],
)
def test_a_reply_is_of_the_type_it_is_said_to_be(
    interface: Interface, path: Path, method: str, parameters: dict[str, Any]
) -> None:
    with Raw(path, 60) as raw:
        raw.call(f"io.memconsole.{method}", **parameters)
        answer = raw.receive()
    if "error" in answer:
        interface.check(answer["parameters"], interface.errors[answer["error"].rpartition(".")[2]])
        assert method == "GetPast", answer
    else:
        interface.check(answer["parameters"], interface.methods[method][1])


def test_changes_are_of_the_type_they_are_said_to_be(interface: Interface, source: ServedSource, path: Path) -> None:
    kinds = set()
    with Raw(path, 60) as raw:
        raw.call("io.memconsole.Watch", more=True, every_ms=250)
        raw.receive()
        snapshot = source.snapshot()
        for change in (
            {"taken_ns": snapshot.taken_ns + 1, "host": msgspec.structs.replace(snapshot.host, name="b")},
            {"regions": snapshot.regions[1:]},
            {"regions": (msgspec.structs.replace(snapshot.regions[0], size=1), *snapshot.regions[1:])},
            {"findings": (), "gaps": ()},
        ):
            source.show(msgspec.structs.replace(snapshot, **change))
            said = raw.receive()["parameters"]
            interface.check(said, interface.methods["Watch"][1])
            kinds |= {name for name, value in said["changes"].items() if value}
    assert kinds == {"fields", "changed", "removed"}


class Sink:
    """A connection that keeps what is said."""

    busy = False

    def __init__(self) -> None:
        self.said: list[dict[str, Any]] = []

    def send(self, data: bytes, _fds: Any = ()) -> None:
        self.said.append(msgspec.json.decode(data[:-1]))


@pytest.mark.parametrize("name", protocol.ERRORS)
def test_an_error_has_all_its_members(interface: Interface, name: str) -> None:
    cls = protocol.ERRORS[name]
    sink = Sink()
    error = cls("read", 5) if issubclass(cls, errors.KernelRefused) else cls("what is wrong")
    Call(sink, "a", more=False, oneway=False).fail(error)  # type: ignore[arg-type]
    (said,) = sink.said
    assert said["error"] == f"io.memconsole.{name}"
    interface.check(said["parameters"], interface.errors[name])


# --- spellings of none ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "call",
    [
        b'{"method":"org.varlink.service.GetInfo","parameters":null}',
        b'{"method":"org.varlink.service.GetInfo","parameters":{}}',
        b'{"method":"org.varlink.service.GetInfo","parameters": null ,"more":null,"oneway":null,"upgrade":null}',
        b'{"method":"io.memconsole.GetSnapshot","parameters":{"known":null}}',
        b'{"method":"io.memconsole.Events","parameters":{"after":null}}',
        b'{"method":"io.memconsole.History","parameters":{"after":null}}',
        b'{"method":"io.memconsole.History","parameters":null}',
        b'{"method":"io.memconsole.Watch","parameters":{"every_ms":null}}',
        b'{"method":"io.memconsole.Plan","parameters":{"action":{"do":"reserve","name":"a","size":4096,"node":null}}}',
        b'{"method":"io.memconsole.Plan","parameters":{"action":{"do":"reserve","name":"a","size":1,"store":null}}}',
    ],
)
def test_null_is_none(path: Path, call: bytes) -> None:
    with Raw(path, 60) as raw:
        raw.send(call + b"\0")
        assert "error" not in raw.receive()


def test_null_is_no_value_where_one_is_wanted(path: Path) -> None:
    with Raw(path, 60) as raw:
        raw.send(b'{"method":"io.memconsole.GetExtents","parameters":{"key":null}}\0')
        assert raw.receive()["error"] == "org.varlink.service.InvalidParameter"
    with pytest.raises(errors.UsageError):
        action_input.decode({"do": "reserve", "name": None, "size": 4096})


def test_an_answer_with_null_is_understood() -> None:
    error = protocol.error_of("io.memconsole.Refused", msgspec.Raw(b'{"code":"Taken","what":"x","why":null}'))
    assert (error.code, error.what, error.why) == ("Taken", "x", "")
    assert isinstance(protocol.error_of("io.memconsole.Gone", msgspec.Raw(b"null")), errors.Gone)
    assert protocol.given(msgspec.Raw(b"null")) == protocol.EMPTY
