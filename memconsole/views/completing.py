"""What may stand where the cursor is on the ``:`` line: its words with their help, and what argument is meant."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from memconsole.arguments import ArgumentKind
from memconsole.command import ArgumentForm, CommandForm
from memconsole.errors import UsageError
from memconsole.fields import TABLES
from memconsole.model import Snapshot
from memconsole.views.console import Console
from memconsole.views.words import WORDS

MOST = 200
FILES = {"FILE", "DIR", "PATH", "A", "B"}


def names_of(kind: ArgumentKind, snapshot: Snapshot | None) -> list[str]:
    """What exists of a kind of argument, to complete from."""
    if snapshot is None:
        return []
    return {
        ArgumentKind.REGION: [region.name for region in snapshot.regions],
        ArgumentKind.GUEST: [guest.name for guest in snapshot.guests],
        ArgumentKind.GRANT: [grant.id for grant in snapshot.grants],
        ArgumentKind.WINDOW: [window.id for window in snapshot.windows],
        ArgumentKind.BDF: [device.bdf for device in snapshot.devices],
    }.get(kind, [])


class Completion(NamedTuple):
    """A word that may stand there, and what it is."""

    word: str
    help: str


class Completions(NamedTuple):
    """The words that may stand where the cursor is, what is before them, and what the argument there is."""

    before: str
    words: Sequence[Completion]
    argument: str = ""

    def line(self, number: int) -> str:
        """The line with one of them."""
        return self.before + self.words[number].word


def complete(app: Console, text: str) -> Completions:
    """What may stand at the end of a line."""
    before, blank, last = text.rpartition(" ")
    before += blank
    done = before.split()
    found, argument = _next(app, done, last)
    low = last.lower()
    fit = [each for each in found if each.word.lower().startswith(low) and each.word != last]
    return Completions(before, fit[:MOST], argument)


def _next(app: Console, done: list[str], last: str) -> tuple[Iterable[Completion], str]:
    """What may stand after these words, and the argument it would be."""
    if done[:1] == ["memconsole"]:
        done = done[1:]
    if not done:
        return _first(app), ""
    forms = [form for form in app.forms if form.words[: len(done)] == tuple(done) and len(form.words) > len(done)]
    if forms:
        words = {form.words[len(done)]: form.help for form in forms}
        found = [Completion(word, help) for word, help in words.items()]
        own, argument = _own(app, done, last)
        return [*own, *found], argument or " ".join(done) + ": one of these"
    form = next((each for each in app.forms if each.words == tuple(done[: len(each.words)])), None)
    if form is not None and (done[0] not in WORDS or form.words != (done[0],)):
        return _arguments(app, form, done[len(form.words) :], last)
    return _own(app, done, last)


def _first(app: Console) -> Iterator[Completion]:
    seen: dict[str, str] = {view.name: f"the view {view.title}" for view in app.numbered_views}
    for form in app.forms:
        alone = len(form.words) == 1
        seen.setdefault(form.words[0], form.help if alone else f"{form.words[0]} commands")
    seen.update({name: word.help for name, word in WORDS.items()})
    return (Completion(word, help) for word, help in seen.items())


def _own(app: Console, done: list[str], last: str) -> tuple[Iterable[Completion], str]:
    word = done[0]
    if word not in WORDS:
        return (), ""
    argument = f"{WORDS[word].arguments}  {WORDS[word].help}".strip()
    if word == "theme" and len(done) == 1:
        return [Completion(name, "") for name in app.themes], argument
    if word == "go" and len(done) == 1:
        return [Completion(name, "bookmark") for name in app.bookmark_names], argument
    if word == "macro":
        return _of_macros(app, done[2:] if done[1:2] == ["run"] else done[1:]), argument
    if word == "export":
        redact = Completion("--redact", "pseudonyms for names")
        return [*(() if "--redact" in done else (redact,)), *_files(last)], argument
    return (), argument


def _of_macros(app: Console, words: list[str]) -> list[Completion]:
    """Macros by name, behind a name its parameters that are not given yet."""
    if not words:
        return [Completion(macro.name, macro.title) for macro in app.macros]
    params = next((each.params for each in app.macros if each.name == words[0]), {})
    given = {each.partition("=")[0] for each in words[1:]}
    return [Completion(f"{name}=", each.help) for name, each in params.items() if name not in given]


def _arguments(app: Console, form: CommandForm, given: list[str], last: str) -> tuple[Iterable[Completion], str]:
    options = {each.name: each for each in form.options}
    if given and given[-1] in options and options[given[-1]].takes:
        argument = options[given[-1]]
        return _values(app, form, argument, last), _told(argument)
    plain = _plain(given, options)
    left = [Completion(each.name, each.help) for each in form.options if each.name not in given]
    if len(plain) < len(form.positional):
        argument = form.positional[len(plain)]
        return [*_values(app, form, argument, last), *left], _told(argument)
    return left, form.help


def _plain(given: Sequence[str], options: Mapping[str, ArgumentForm]) -> list[str]:
    """The words that are neither options nor their values."""
    plain, skip = [], False
    for word in given:
        if skip:
            skip = False
        elif word in options:
            skip = options[word].takes
        else:
            plain.append(word)
    return plain


def _told(argument: ArgumentForm) -> str:
    return f"{argument.name} {argument.value if argument.takes else ''}".rstrip() + f"  {argument.help}"


def _values(app: Console, form: CommandForm, argument: ArgumentForm, last: str) -> list[Completion]:
    if argument.choices:
        return [Completion(choice, "") for choice in argument.choices]
    if argument.value in FILES or argument.kind is ArgumentKind.PATH:
        return _files(last)
    if argument.kind is not None:
        kind = argument.kind.value
        return [Completion(name, kind) for name in names_of(argument.kind, app.snapshot)]
    table = TABLES.get("findings" if form.words == ("audit",) else form.words[0])
    if table is not None and argument.name in {"--columns", "--sort"}:
        given, comma, _ = last.rpartition(",") if argument.name == "--columns" else ("", "", "")
        fields = (field for field in table.fields if field.id not in given.split(","))
        return [Completion(given + comma + field.id, field.help) for field in fields]
    if argument.name in {"REGION-OR-GUEST", "TARGET"}:
        kinds = (ArgumentKind.GUEST, ArgumentKind.REGION) if argument.name != "TARGET" else (ArgumentKind.GUEST,)
        return [Completion(name, kind.value) for kind in kinds for name in names_of(kind, app.snapshot)]
    if argument.name == "--view":
        return [Completion(view.name, view.title) for view in app.numbered_views]
    return []


def _files(last: str) -> list[Completion]:
    """The files that a beginning of a path names, directories with a ``/``."""
    head, slash, name = last.rpartition("/")
    above = Path(head + slash).expanduser() if slash else Path()
    try:
        found = sorted(each for each in above.iterdir() if each.name.startswith(name) and (name or each.name[0] != "."))
        return [Completion(f"{head}{slash}{each.name}" + "/" * each.is_dir(), "") for each in found[:MOST]]
    except OSError:
        return []


def unknown(app: Console, word: str) -> UsageError:
    """The error for a word that begins no line."""
    known = ", ".join(dict.fromkeys(each.word for each in _first(app)))
    return UsageError(f"there is no command {word!r}", "none has this name", f"one of: {known}")
