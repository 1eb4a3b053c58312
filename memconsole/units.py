"""Sizes, addresses, durations and device names as people write them, both ways.

Grammar of a size: ``NUMBER [K|M|G|T|P] [i] [B]``, powers of 1024, or ``0x...`` bytes. Of a time: ``-NUMBER s|m|h|d``
ago, seconds or nanoseconds since the epoch, or ISO 8601 (in UTC where it names no zone; a time alone is of today).
Of a duration: ``NUMBER ns|us|ms|s|m|h|d``, seconds where no unit stands.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Sequence

from memconsole.errors import UsageError

PAGE = 4096
_UNITS = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4, "P": 5}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([KMGTP]?)i?B?\s*", re.IGNORECASE)
_HEX = re.compile(r"\s*0[xX][0-9a-fA-F]+\s*")
_BDF = re.compile(r"(?:([0-9a-fA-F]{4,8}):)?([0-9a-fA-F]{2}):([0-9a-fA-F]{2})\.([0-7])")
_AGO = re.compile(r"-(\d+(?:\.\d+)?)([smhd])")
_SINCE_EPOCH = re.compile(r"\d{9,}(?:\.\d+)?")
_LASTS = re.compile(r"(\d+(?:\.\d+)?)(ns|us|ms|s|m|h|d)?")
_NANOSECONDS = {"ns": 1, "us": 1_000, "ms": 1_000_000}
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}
MAX_SIZE = 1 << 62
_SPARKS = "▁▂▃▄▅▆▇█"
_LATEST_S = 1 << 33
_LONGEST = 64


def parse_size(text: str) -> int:
    """Bytes from ``64M``, ``2GiB``, ``1.5G``, ``4096`` or ``0x1000``.

    Raises:
        UsageError: not a size, negative, a fraction of a byte, or beyond 4 EiB.
    """
    if len(text) > _LONGEST:
        raise UsageError(f"{text[:_LONGEST]!r}... is not a size", f"it has {len(text)} characters", "write 64M or 2G")
    if _HEX.fullmatch(text):
        value = int(text, 16)
    else:
        match = _SIZE.fullmatch(text)
        if match is None:
            raise UsageError(f"{text!r} is not a size", "a size is a number and K, M, G, T or P", "write 64M or 2G")
        number, unit = match.groups()
        factor = 1 << (10 * _UNITS[unit.upper()])
        if "." in number:
            whole, fraction = number.split(".")
            scaled = int(whole + fraction) * factor
            if scaled % 10 ** len(fraction):
                raise UsageError(f"{text!r} is not a size", "it is not a whole number of bytes", "write 64M or 2G")
            value = scaled // 10 ** len(fraction)
        else:
            value = int(number) * factor
    if value > MAX_SIZE:
        raise UsageError(f"{text!r} is too large", "no address space holds more than 4 EiB", "check the unit")
    return value


def format_size(value: int) -> str:
    """A size in the largest unit that keeps it exact, else with one decimal: ``64M``, ``1.5G``, ``0``."""
    if value < 0:
        return f"-{format_size(-value)}"
    for unit, power in (("P", 50), ("T", 40), ("G", 30), ("M", 20), ("K", 10)):
        if value >= 1 << power:
            if value % (1 << power) == 0:
                return f"{value >> power}{unit}"
            return f"{value / (1 << power):.1f}{unit}"
    return str(value)


def exact_size(value: int) -> str:
    """A size that :func:`parse_size` reads back to the same number: ``64M``, ``1536K``, ``4097``."""
    for unit, power in (("P", 50), ("T", 40), ("G", 30), ("M", 20), ("K", 10)):
        if value and value % (1 << power) == 0:
            return f"{value >> power}{unit}"
    return str(value)


def parse_address(text: str) -> int:
    """A gpa, iova or offset: ``0x...`` hexadecimal, else a size."""
    return parse_size(text)


def format_address(value: int) -> str:
    """An address in hexadecimal, ``0x`` and at least eight digits."""
    return f"0x{value:08x}"


def parse_bdf(text: str) -> str:
    """A PCI address with its domain (``0000:00:04.0``) from ``00:04.0`` or the whole.

    Raises:
        UsageError: not a PCI address.
    """
    match = _BDF.fullmatch(text.strip())
    if match is None:
        raise UsageError(f"{text!r} is not a PCI address", "it is DOMAIN:BUS:DEVICE.FUNCTION", "write 0000:00:04.0")
    domain, bus, device, function = match.groups()
    return f"{(domain or '0000').lower()}:{bus.lower()}:{device.lower()}.{function}"


def format_duration(ns: int) -> str:
    """A duration in the unit that leaves one to three digits before the point: ``812ns``, ``3.1ms``, ``2m05s``."""
    if ns < 1_000:
        return f"{ns}ns"
    if ns < 1_000_000:
        return f"{ns / 1e3:.1f}us"
    if ns < 1_000_000_000:
        return f"{ns / 1e6:.1f}ms"
    seconds = ns / 1e9
    if seconds < 60:
        return f"{seconds:.1f}s"
    minutes, rest = divmod(int(seconds), 60)
    if minutes < 60:
        return f"{minutes}m{rest:02d}s"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours}h{minutes:02d}m"
    return f"{hours // 24}d{hours % 24:02d}h"


def format_age(ns: int) -> str:
    """An age as people say it, in whole seconds: ``0s``, ``14s``, ``2m05s``."""
    seconds = ns // 1_000_000_000
    return f"{seconds}s" if seconds < 60 else format_duration(seconds * 1_000_000_000)


def parse_duration(text: str) -> int:
    """Nanoseconds from ``250ms``, ``1.5s``, ``2m`` or ``3`` (seconds).

    Raises:
        UsageError: not a duration.
    """
    match = _LASTS.fullmatch(text.strip()) if len(text) <= _LONGEST else None
    if match is None:
        raise UsageError(f"{text[:_LONGEST]!r} is not a duration", "it is a number and a unit", "write 250ms, 3s or 2m")
    unit = match[2] or "s"
    return int(float(match[1]) * (_NANOSECONDS.get(unit) or _SECONDS[unit] * 1_000_000_000))


def format_percent(value: float) -> str:
    """Per cent with one decimal, without the sign."""
    return f"{value:.1f}"


def spark(trend: Sequence[float], whole: float = 0.0) -> str:
    """A row of columns, an eighth of a cell to a cell high; the highest is ``whole``, or the largest number."""
    top = max(whole, *trend, 1e-9) if trend else 1.0
    return "".join(_SPARKS[min(int(max(each, 0.0) / top * len(_SPARKS)), len(_SPARKS) - 1)] for each in trend)


def format_count(value: int) -> str:
    """A count in at most four cells: ``999``, ``12k``, ``3M``; cut, never rounded up."""
    for size, unit in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if value >= size:
            return f"{value // size}{unit}"
    return str(value)


def parse_time(text: str, now_ns: int) -> int:
    """Nanoseconds since the epoch from ``-5m``, ``14:03:12``, ``2026-09-21T14:03:12+02:00``, ``1790000000``; with or
    without the ``@`` that stands before a time where a file could be meant.

    Raises:
        UsageError: not a time.
    """
    text = text.strip().removeprefix("@")
    if len(text) > _LONGEST:
        raise UsageError(f"{text[:_LONGEST]!r}... is not a time", f"it has {len(text)} characters", "write -5m")
    if match := _AGO.fullmatch(text):
        return now_ns - int(float(match[1]) * _SECONDS[match[2]] * 1e9)
    if _SINCE_EPOCH.fullmatch(text):
        return int(text) if text.isdigit() and int(text) > _LATEST_S else int(float(text) * 1e9)
    now = datetime.datetime.fromtimestamp(now_ns // 1_000_000_000, datetime.UTC)
    try:
        if re.match(r"\d\d:", text):
            text = f"{now.date().isoformat()}T{text}"
        found = datetime.datetime.fromisoformat(text)
        if found.tzinfo is None:
            found = found.replace(tzinfo=datetime.UTC)
        whole = found.replace(microsecond=0)
        return int(whole.timestamp()) * 1_000_000_000 + found.microsecond * 1000
    except (ValueError, OverflowError):
        raise UsageError(
            f"{text!r} is not a time",
            "its form is not known",
            "write -5m, 14:03:12, 2026-09-21T14:03:12 or seconds since the epoch",
        ) from None


def last_answer(answered_ns: int | None, now_ns: int) -> str:
    """How old the last answer of a silent one is, in words; None: it never answered."""
    if answered_ns is None:
        return "it has never answered"
    return f"its last answer is {format_duration(max(0, now_ns - answered_ns))} old"


def format_time(ns: int) -> str:
    """A time since the epoch in UTC, to the millisecond: ``2026-09-21 14:03:12.250 UTC``; else its nanoseconds."""
    try:
        found = datetime.datetime.fromtimestamp(ns // 1_000_000_000, datetime.UTC)
    except (ValueError, OverflowError, OSError):  # no year that a calendar has
        return f"{ns} ns since the epoch"
    return f"{found:%Y-%m-%d %H:%M:%S}.{ns // 1_000_000 % 1000:03d} UTC"
