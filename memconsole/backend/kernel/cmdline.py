r"""Kernel command lines as the kernel itself reads them: this one's (/proc/cmdline), and that of a kernel to be booted.

    line   = blank* { word blank+ }         up to a word that is --: what follows is init's
    word   = NAME [ "=" VALUE ]             quotes hold blanks together and belong to neither
    blank  = [\t\n\v\f\r ] | 0xa0           isspace() of the kernel, in the middle of UTF-8 too

A quote may stand before the whole word (``"kho=on"``) or before the value (``dyndbg="file a +p"``); one in the middle
of a value holds blanks together and stays. In names ``-`` and ``_`` are the same. Where a word is given several times,
it depends on who reads it: a switch is what the last value says that says on or off.
Sources: lib/cmdline.c:next_arg, kernel/params.c:parse_args, lib/kstrtox.c:kstrtobool.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

from memconsole.backend.kernel import tree
from memconsole.backend.kernel.tree import Root

_BLANKS = b"\t\n\v\f\r \xa0"
_SWITCH = {"y": True, "t": True, "1": True, "on": True, "n": False, "f": False, "0": False, "of": False}


class MemmapRange(NamedTuple):
    """What a part of ``memmap=``, ``said``, names: bytes, and a ``mark``: ``!`` (persistent), ``$``, ``#`` or ``@``."""

    size: int
    mark: str
    start: int
    said: str

    @property
    def meaning(self) -> tuple[int, str, int]:
        """What the kernel makes of it, however it was written."""
        return self.size, self.mark, self.start


class BootParameter(NamedTuple):
    """A parameter: ``name`` with ``_`` for ``-``; ``value`` without its quotes, None where there is no ``=``."""

    name: str
    value: str | None = None

    def __str__(self) -> str:
        if self.value is None:
            return self.name
        return f'{self.name}="{self.value}"' if " " in self.value else f"{self.name}={self.value}"


def read(root: Root = "/") -> tuple[BootParameter, ...]:
    """The words this kernel was booted with (/proc/cmdline).

    Raises:
        NotFound, Denied, KernelRefused: it cannot be read.
    """
    return parse(tree.read(root, "/proc/cmdline"))


def parse(line: bytes | str) -> tuple[BootParameter, ...]:
    """The kernel's own words of a command line, in order."""
    rest = line.encode("utf-8", "surrogateescape") if isinstance(line, str) else line
    found = []
    while rest := rest.lstrip(_BLANKS):
        end = _end(rest)
        word = _word(rest[:end])
        if word == BootParameter("--"):
            break
        found.append(word)
        rest = rest[end:]
    return tuple(found)


def switched_on(words: Iterable[BootParameter], name: str) -> bool | None:
    """What a switch was set to; None where no word of this name says on or off."""
    said = None
    for word in words:
        if word.name == name and word.value is not None:
            value = word.value.lower()
            said = _SWITCH.get(value[:1], _SWITCH.get(value[:2], said))
    return said


def values(words: Iterable[BootParameter], name: str) -> tuple[str, ...]:
    """Every value a name was given, in order; a word without one gives an empty string."""
    return tuple(word.value or "" for word in words if word.name == name)


def memmaps(words: Iterable[BootParameter]) -> tuple[MemmapRange, ...]:
    """The ranges that every ``memmap=`` names, in order; the kernel passes over a part that it does not understand.

    Numbers are decimal, octal (0) or hex (0x), with K, M, G, T, P or E behind them (lib/cmdline.c:memparse).
    Source: arch/x86/kernel/e820.c:parse_memmap_opt.
    """
    found = []
    for value in values(words, "memmap"):
        for part in value.split(","):
            at = _RANGE.match(part)
            if at is not None:
                found.append(MemmapRange(_memparse(at["size"]), at["mark"], _memparse(at["start"]), part))
    return tuple(found)


_NUMBER = r"(?:0[xX][0-9a-fA-F]+|[0-9]+)[kKmMgGtTpPeE]?"
_RANGE = re.compile(rf"(?P<size>{_NUMBER})(?P<mark>[!$#@])(?P<start>{_NUMBER})")


def _memparse(text: str) -> int:
    shift = "kmgtpe".find(text[-1].lower()) if not text.lower().startswith("0x") or text[-1].lower() != "e" else -1
    digits = text[:-1] if shift >= 0 else text
    lower = digits.lower()
    base = 16 if lower.startswith("0x") else 8 if lower.startswith("0") and lower != "0" else 10
    read = re.match(r"[0-7]*" if base == 8 else r"(0x[0-9a-f]+|[0-9]+)", lower)
    number = int(read[0] or "0", base) if read is not None else 0
    return number << 10 * (shift + 1)


def _end(rest: bytes) -> int:
    """Where the first word ends: at a blank outside of quotes."""
    quoted = False
    for at, byte in enumerate(rest):
        if byte == ord('"'):
            quoted = not quoted
        elif byte in _BLANKS and not quoted:
            return at
    return len(rest)


def _word(raw: bytes) -> BootParameter:
    whole = raw.startswith(b'"')
    raw = raw[1:] if whole else raw
    at = raw.find(b"=", 1)  # one that stands first is part of the name
    if at >= 0 and raw[at + 1 : at + 2] == b'"':
        return BootParameter(_name(raw[:at]), tree.text(raw[at + 2 :].removesuffix(b'"')))
    raw = raw.removesuffix(b'"') if whole else raw
    return BootParameter(_name(raw), None) if at < 0 else BootParameter(_name(raw[:at]), tree.text(raw[at + 1 :]))


def _name(raw: bytes) -> str:
    name = tree.text(raw)
    return name if name == "--" else name.replace("-", "_")
