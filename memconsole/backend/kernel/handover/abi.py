r"""The words by which kernels say which layouts of handed over memory they write and read.

    offer    = word { NUL word }            several layouts at once, for the way back to an older kernel
    word     = part { ";" part }            what a layout is built of: the base first, the others in order
    part     = name { sep field }           with a version among its fields
    version  = "v" [0-9]+                   at the end (kho-v4, kvm_vm_luo_v1) or in the middle (luo-v3-block-v1)
    name     = [a-z] [a-z0-9]*              the family
    field    = [a-z0-9]+
    sep      = "-" | "_"

Kernels compare whole words. A word is *understood* here where each of its parts is a name and one version (``kho-v4``,
``luo-v5;block-v1``): of two such words of one shape it is certain that they are the same or differ. Of everything else
(versions in the middle, flags behind a word, other punctuation) only that it is the same can be said.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

FAMILIES = ("kho", "luo", "memfd")
"""Whose words two kernels must share: the handover, live update, and the files that memconsole preserves."""

_PART = re.compile(r"[a-z][a-z0-9]*(?:[-_][a-z0-9]+)+")
_VERSION = re.compile(r"v[0-9]+")
_SEPARATORS = re.compile(r"[-_]")
_OF_A_WORD = rb"[A-Za-z0-9_;:+,.~=-]"
_BEFORE = re.compile(_OF_A_WORD + rb"*\Z")
_REST = re.compile(_OF_A_WORD + rb"*(?=\0)")
_LONGEST = 128


class AbiWord(NamedTuple):
    """A word: its parts, and for each that is understood its name and version."""

    text: str
    parts: tuple[tuple[str, int] | None, ...]

    @property
    def understood(self) -> bool:
        """Whether every part is a name and one version."""
        return None not in self.parts

    @property
    def shape(self) -> tuple[str, ...]:
        """The names of its parts, as far as they are understood."""
        return tuple(part[0] for part in self.parts if part is not None)


class Verdict(enum.Enum):
    """What is known of whether one kernel reads what another writes."""

    SAME = "same"
    OTHER = "other"
    UNKNOWN = "unknown"
    NONE = "none"


def parse(text: str) -> AbiWord | None:
    """A word by the grammar; None where it is none (it has no version)."""
    fields = _SEPARATORS.split(re.sub(r"[^a-z0-9]+", "-", text))
    if not text[:1].islower() or not any(_VERSION.fullmatch(field) for field in fields):
        return None
    return AbiWord(text, tuple(_part(part) for part in text.split(";")))


def family(text: str) -> str:
    """The first name of a word; empty where it is none."""
    word = parse(text)
    return re.split(r"[^a-z0-9]", word.text)[0] if word is not None else ""


def words(blob: bytes, families: Iterable[str] = FAMILIES) -> tuple[str, ...]:
    """The words that stand in a blob, each ended by a NUL, with one of these families among their fields; sorted.

    A compiler may have put a word at the end of a longer text: it begins behind what is no part of a word.
    """
    return tuple(sorted({word for name in families for word in _found(blob, name)}))


def compare(name: str, ours: Iterable[str], theirs: Iterable[str]) -> Verdict:
    """Whether a kernel that offers the words ``theirs`` reads what one that offers ``ours`` writes of a family.

    NONE: it has no word of the family at all.
    """
    mine = {word for word in ours if family(word) == name}
    all_of_theirs = tuple(theirs)
    found = {word for word in all_of_theirs if family(word) == name}
    if mine & found:
        return Verdict.SAME
    if not found:
        # It may have moved into another word (shmem-memfd-v1): that is not to lack it.
        moved = any(name in re.split(r"[^a-z0-9]", word) for word in all_of_theirs)
        return Verdict.UNKNOWN if moved else Verdict.NONE
    known = [word for text in (*mine, *found) if (word := parse(text)) is not None]
    certain = all(word.understood for word in known) and len({word.shape for word in known}) == 1
    return Verdict.OTHER if mine and certain else Verdict.UNKNOWN


def _part(text: str) -> tuple[str, int] | None:
    fields = _SEPARATORS.split(text)
    if _PART.fullmatch(text) and len(fields) == 2 and _VERSION.fullmatch(fields[1]):
        return fields[0], int(fields[1][1:]) if len(fields[1]) < 12 else -1
    return None


def _found(blob: bytes, name: str) -> Iterator[str]:
    needle = name.encode()
    at = blob.find(needle)
    while at >= 0:
        rest = _REST.match(blob, at, at + _LONGEST)
        if rest is not None:
            before = _BEFORE.search(blob[max(0, at - _LONGEST) : at])
            text = ((before[0] if before else b"") + rest[0]).decode("ascii", "replace")
            if len(text) < _LONGEST and parse(text) is not None and name in re.split(r"[^a-z0-9]", text):
                yield text
        at = blob.find(needle, at + 1)
