"""The language that rows of a table are chosen by: the console's ``/``, ``--where`` of the command line, macros.

Grammar::

    filter  := all ("|" all)*                 either
    all     := term+                          each of them
    term    := "!" term | "(" filter ")" | compare | text
    compare := FIELD OP value                 no blanks between
    OP      := ":" | "=" | "!=" | ">" | ">=" | "<" | "<="
    value   := WORD | QUOTED                  "(" and "|" in a word need quotes
    text    := WORD | QUOTED                  found in any column that is shown
    QUOTED  := '"' anything but '"' '"'

``FIELD`` is a field's id, its title, or the beginning of either where only one field begins so (``page`` for
``page_size``). ``:`` finds a text within the field, or the whole of it where the value has ``*`` or ``?``; of a number
it is ``=``. ``=`` is the whole value. Of a field that holds several values one is enough. ``>`` and its like compare
numbers as the field is measured: ``size>1.5G``, ``gpa<0x100000000``, ``gap>=10ms``, ``created>-5m``. What is not known
(``-``) compares as false; ``FIELD:-`` finds it. Upper and lower case are the same.
"""

from __future__ import annotations

import operator
import re
import time
from collections.abc import Callable, Iterable, Sequence
from fnmatch import translate
from typing import Any, NamedTuple

from memconsole.errors import UsageError
from memconsole.field import Field
from memconsole.units import parse_duration, parse_size, parse_time

Test = Callable[[Any, Callable[[], str]], bool]
"""Whether an entity is chosen; the second gives the text of its shown columns, in lower case."""

LONGEST = 1000
DEEPEST = 32
EXAMPLE = "write state:mapped, size>1G, guest:web*, !page:4K or (a | b)"

_TOKEN = re.compile(
    r"""(?P<blank>\s+)|(?P<mark>[()|])|(?P<not>!(?!=))
    |(?P<compare>(?P<field>[A-Za-z_][A-Za-z0-9_-]*)(?P<op>!=|>=|<=|[:=<>])(?P<value>"[^"]*"|[^\s()|"]*))
    |"(?P<quoted>[^"]*)"|(?P<word>[^\s()|"!][^\s()|"]*)""",
    re.VERBOSE,
)
_ORDER: dict[str, Callable[[Any, Any], bool]] = {
    ">": operator.gt,
    ">=": operator.ge,
    "<": operator.lt,
    "<=": operator.le,
}
_MEASURES = {
    "bytes": (parse_size, "a size such as 64M or 1.5G"),
    "address": (parse_size, "an address such as 0x100000000"),
    "time": (parse_duration, "a duration such as 10ms or 2s"),
    "UTC": (lambda text: parse_time(text, time.time_ns()), "a time such as -5m or 14:03:12"),
}


def _plain(text: str) -> float:
    return int(text, 16) if text.lower().startswith("0x") else float(text.replace(",", "").rstrip("%"))


_PLAIN = (_plain, "a number")


class Token(NamedTuple):
    """A part of a filter: where it begins, what kind it is of, and its text."""

    at: int
    kind: str
    text: str
    field: str = ""
    op: str = ""


class Where:
    """A filter that was understood, and the ``fields`` it names.

    It is ``plain`` if it only looks for ``words`` (in lower case), all of them, so that a longer one finds fewer rows.
    """

    def __init__(
        self, text: str, test: Test | None, *, words: Sequence[str] | None = None, fields: Sequence[Field] = ()
    ) -> None:
        self.text = text
        self.plain = words is not None
        self.words = tuple(words or ())
        self.fields = tuple(fields)
        self._test = test

    def __bool__(self) -> bool:
        return self._test is not None

    def __call__(self, item: Any, shown: Callable[[], str]) -> bool:
        """Whether an entity is chosen; ``shown`` gives the text of its shown columns, in lower case."""
        return self._test is None or self._test(item, shown)


EVERYTHING = Where("", None, words=())


def parse(text: str, fields: Sequence[Field]) -> Where:
    """The filter that a text says, for a table of these fields.

    Raises:
        UsageError: it names a field that the table has not, a value that the field cannot have, or does not end.
    """
    if len(text) > LONGEST:
        raise UsageError("the filter is too long", f"it has {len(text)} characters, {LONGEST} are read", "shorten it")
    tokens = list(_tokens(text))
    if not tokens:
        return EVERYTHING
    reader = _Reader(tokens, fields)
    test = reader.either(0)
    if reader.left:
        raise UsageError("the filter has a ) that closes nothing", _place(reader.left[0]), "remove it, or quote it")
    plain = all(token.kind in {"word", "quoted"} for token in tokens)
    return Where(text, test, words=[token.text.lower() for token in tokens] if plain else None, fields=reader.named)


def choose(where: Where, shown: Sequence[Field], rows: Iterable[Any]) -> list[Any]:
    """The rows that a filter finds; words are looked for in the ``shown`` fields."""
    return [row for row in rows if where(row, lambda row=row: row_text(shown, row))]  # type: ignore[misc]


def row_text(fields: Sequence[Field], item: Any) -> str:
    """What words are looked for in."""
    return "\x1f".join(field.text(item) for field in fields).lower()


def completions(text: str, fields: Sequence[Field], rows: Sequence[Any]) -> list[str]:
    """What the last word of a filter may become: fields with their ``:``, or the values that rows have in its field."""
    head = re.match(r"(?s)(.*[\s()|!])?(.*)", text)
    before, last = (head[1] or "", head[2]) if head else ("", text)
    named = re.fullmatch(r'([A-Za-z_][A-Za-z0-9_-]*)(!=|[:=])("?)([^"]*)', last)
    if named is None:
        return [f"{before}{field.id}:" for field in fields if last and field.id.startswith(last.lower())]
    try:
        field = _named(named[1], fields)
    except UsageError:
        return []
    values = sorted({value for row in rows[:LONGEST] for value in _values(field, row)})
    start = f"{before}{named[1]}{named[2]}"
    return [start + _quoted(value) for value in values if value.startswith(named[4].lower()) and value != named[4]]


def _tokens(text: str) -> Iterable[Token]:
    at = 0
    while at < len(text):
        match = _TOKEN.match(text, at)
        if match is None:
            raise UsageError("the filter has a quote that does not end", _near(text, at), 'add "')
        if match["compare"] is not None:
            value = match["value"]
            if not value.startswith('"') and text[match.end() : match.end() + 1] == '"':
                raise UsageError("the filter has a quote in the middle of a word", _near(text, at), "quote all of it")
            yield Token(at, "compare", value.strip('"'), match["field"], match["op"])
        elif match["quoted"] is not None:
            yield Token(at, "quoted", match["quoted"])
        elif match["blank"] is None:
            kind = match.lastgroup or ""
            yield Token(at, "mark" if kind in {"mark", "not"} else "word", match[0])
        at = match.end()


def _near(text: str, at: int) -> str:
    return f"at {text[at : at + 20]!r}"


def _place(token: Token) -> str:
    return f"it is character {token.at + 1}"


class _Reader:
    """Reads the tokens of a filter from the left."""

    def __init__(self, tokens: list[Token], fields: Sequence[Field]) -> None:
        self.left = tokens
        self._fields = fields
        self.named: list[Field] = []

    def either(self, depth: int) -> Test:
        """The rule ``filter``."""
        if depth > DEEPEST:
            raise UsageError("the filter is nested too deeply", f"more than {DEEPEST} brackets are open", "simplify it")
        parts = [self._each(depth)]
        while self.left and self.left[0].text == "|" and self.left[0].kind == "mark":
            self.left = self.left[1:]
            parts.append(self._each(depth))
        if len(parts) == 1:
            return parts[0]
        return lambda item, shown: any(part(item, shown) for part in parts)

    def _each(self, depth: int) -> Test:
        parts = []
        while self.left and not (self.left[0].kind == "mark" and self.left[0].text in "|)"):
            parts.append(self._term(depth))
        if not parts:
            where = _place(self.left[0]) if self.left else "it ends there"
            raise UsageError("the filter lacks a term", where, EXAMPLE)
        if len(parts) == 1:
            return parts[0]
        return lambda item, shown: all(part(item, shown) for part in parts)

    def _term(self, depth: int) -> Test:
        inverted = False
        while self.left and self.left[0].kind == "mark" and self.left[0].text == "!":
            self.left = self.left[1:]
            inverted = not inverted
        if not self.left or (self.left[0].kind == "mark" and self.left[0].text in "|)"):
            raise UsageError("the filter has a ! with nothing behind it", "it says what must not be", EXAMPLE)
        test = self._positive(depth)
        return (lambda item, shown: not test(item, shown)) if inverted else test

    def _positive(self, depth: int) -> Test:
        token, self.left = self.left[0], self.left[1:]
        if token.kind == "compare":
            self.named.append(_named(token.field, self._fields))
            return _compare(self.named[-1], token.op, token.text)
        if token.kind != "mark":
            word = token.text.lower()
            return lambda _, shown: word in shown()
        test = self.either(depth + 1)
        if not self.left or self.left[0].text != ")":
            raise UsageError("the filter has a ( that is not closed", _place(token), "add ), or quote it")
        self.left = self.left[1:]
        return test


def _named(name: str, fields: Sequence[Field]) -> Field:
    """The field that a word names."""
    low = name.lower()
    for field in fields:
        if low in {field.id, field.title.lower()}:
            return field
    begun = [field for field in fields if field.id.startswith(low) or field.title.lower().startswith(low)]
    if len(begun) == 1:
        return begun[0]
    if begun:
        raise UsageError(f"{name!r} is more than one field", "", f"one of: {', '.join(field.id for field in begun)}")
    known = ", ".join(field.id for field in fields)
    raise UsageError(f"there is no field {name!r}", "a text with : or = in it needs quotes", f"one of: {known}")


def _compare(field: Field, op: str, value: str) -> Test:
    if op == "!=":
        equal = _compare(field, "=", value)
        return lambda item, shown: not equal(item, shown)
    if value == "-" and op in {":", "="}:
        return lambda item, _: field.text(item) == "-"
    if op in _ORDER:
        order, bound = _ORDER[op], _measured(field, value)
        return lambda item, _: _ordered(order, field.get(item), bound)
    if _is_number(field) and not set("*?") & set(value):
        try:
            exact = _measured(field, value)
        except UsageError:
            if op == "=":
                raise
        else:
            shown_as = value.lower()
            return lambda item, _: _ordered(operator.eq, field.get(item), exact) or shown_as in _values(field, item)
    return _like(field, value.lower(), whole=op == "=")


def _like(field: Field, value: str, *, whole: bool) -> Test:
    if set("*?") & set(value):
        pattern = re.compile(translate(value.replace("[", "[[]")))
        return lambda item, _: any(pattern.match(each) for each in _values(field, item))
    if whole:
        return lambda item, _: value in _values(field, item)
    return lambda item, _: value in field.text(item).lower()


def _values(field: Field, item: Any) -> tuple[str, ...]:
    """The texts of a field's values: of several, each."""
    value = field.get(item)
    if isinstance(value, tuple):
        return tuple(str(each).lower() for each in value)
    return (field.text(item).lower(),)


def _is_number(field: Field) -> bool:
    return field.right or field.unit == "UTC"


def _measured(field: Field, value: str) -> float:
    """A value as the field measures it."""
    if not _is_number(field):
        raise UsageError(
            f"{field.id} is no number", "it can only be compared with : and =", f"write {field.id}:{value}"
        )
    read, form = _MEASURES.get(field.unit, _PLAIN)
    try:
        return read(value)
    except (UsageError, ValueError):
        raise UsageError(
            f"{value!r} cannot be compared with {field.id}", f"it is not {form}", f"write {form}"
        ) from None


def _ordered(order: Callable[[Any, Any], bool], value: Any, bound: float) -> bool:
    return isinstance(value, int | float) and order(value, bound)


def _quoted(value: str) -> str:
    return f'"{value}"' if re.search(r'[\s()|"]', value) else value
