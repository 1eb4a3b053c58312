"""``--raw START``: the word by which an operator names a range that the kernel does not manage (memmap=nn$ss)."""

from __future__ import annotations

import argparse

from memconsole.errors import UsageError
from memconsole.units import parse_address


def add_raw(parser: argparse.ArgumentParser, help: str) -> None:
    """The option, which may be given several times; nothing reads such a range without it."""
    parser.add_argument("--raw", metavar="START", type=_start, action="append", default=[], help=help)


def _start(text: str) -> int:
    try:
        return parse_address(text)
    except UsageError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
