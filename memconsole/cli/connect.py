"""Whom a command talks to: the control process where it answers, else this process, where that makes sense."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from contextlib import closing, contextmanager
from contextvars import ContextVar
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from memconsole import decoding, paths
from memconsole.errors import NoControl, Refused, UsageError
from memconsole.source import ReadOnly, Source

if TYPE_CHECKING:
    from memconsole.backend.control import Control
    from memconsole.backend.wire.client import Client
    from memconsole.backend.wire.dialing import Place
    from memconsole.fleet import Fleet, Member

HOST = "MEMCONSOLE_HOST"


_given: ContextVar[Source | None] = ContextVar("given", default=None)


@contextmanager
def using(found: Source) -> Iterator[None]:
    """Have the commands of this thread work on a Source that is there already, which stays open."""
    before = _given.set(found)
    try:
        yield
    finally:
        _given.reset(before)


def asked_hosts(options: argparse.Namespace) -> list[str]:
    """The hosts that are asked: other hosts as ssh takes them, ``""`` for this one, snapshot files.

    They are those of ``--host`` and ``--hosts``, else of ``MEMCONSOLE_HOST``, unless the command line says
    ``--embedded``.

    Raises:
        BadFile: ``--hosts`` cannot be read.
    """
    found = list(options.host or ())
    if options.hosts:
        text = decoding.text(decoding.contents(options.hosts, limit=decoding.SETTINGS))
        found += [word for row in text.splitlines() if (word := row.partition("#")[0].strip())]
    if not found and options.host is None and not options.embedded:
        found = os.environ.get(HOST, "").split()
    return found or [""]


def are_many(options: argparse.Namespace) -> bool:
    """Whether several hosts are asked, or one that is a snapshot file."""
    found = asked_hosts(options)
    return len(found) > 1 or is_recorded(found[0])


def is_recorded(host: str) -> bool:
    """Whether what stands for a host is a snapshot file: a path with a ``/``, or a name that ends in ``.snap``."""
    return not host.startswith("ssh://") and ("/" in host or host.endswith(".snap"))


def asked_host(options: argparse.Namespace) -> str:
    """The other host whose control process is asked, or nothing, for this one.

    Raises:
        UsageError: several are (``OneHost``).
    """
    if are_many(options):
        raise UsageError(
            "the command is for one host",
            f"{len(asked_hosts(options))} are named",
            "name one with --host; hosts, listings and actions take several, and memconsole open takes a file",
            code="OneHost",
        )
    return asked_hosts(options)[0]


def fleet_of(options: argparse.Namespace, *, read_only: str = "") -> Fleet:
    """The hosts that the command line names, as a fleet that was not started yet.

    Raises:
        UsageError: two have the same name, or one is no host.
    """
    from memconsole.fleet import Fleet

    members = [_member(host, options) for host in asked_hosts(options)]
    names = [member.name for member in members]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UsageError(f"{twice} is there twice", "a host is told by its name", "name each host once")
    reason = "--read-only was given" if options.read_only else read_only
    return Fleet(members, interval=options.interval, read_only=reason)


def _member(host: str, options: argparse.Namespace) -> Member:
    from memconsole.backend.wire.client import Client
    from memconsole.backend.wire.remote import Remote, checked
    from memconsole.fleet import Member
    from memconsole.recording import Recording

    name = _name_of(host)
    if is_recorded(host):
        return Member(name, partial(Recording, host), recorded=True)
    if not host:
        return Member(name, lambda: Client(asked_socket(options)))
    place = Remote(checked(host), options.socket or "")
    return Member(name, lambda: Client(place))


def _name_of(host: str) -> str:
    """What a host of a fleet is called, as it was given."""
    if is_recorded(host):
        return Path(host).name.removesuffix(".snap")
    return host.removeprefix("ssh://").replace("/", "") or "localhost"


def alone(options: argparse.Namespace, name: str) -> argparse.Namespace:
    """The same options for one of their hosts by its name, as if no other had been given; a file is of this host."""
    host = next(host for host in asked_hosts(options) if _name_of(host) == name)
    return argparse.Namespace(**{**vars(options), "host": ["" if is_recorded(host) else host], "hosts": ""})


def place(options: argparse.Namespace) -> Place:
    """Where the control process is that the command line asks."""
    from memconsole.backend.wire.dialing import Local

    if host := asked_host(options):
        from memconsole.backend.wire.remote import Remote

        return Remote(host, options.socket or "", asks=True)
    return Local(asked_socket(options))


def client(options: argparse.Namespace) -> Client:
    """The control process that the command line asks, and no other.

    Raises:
        NoControl: it does not answer.
    """
    from memconsole.backend.wire.client import Client

    return Client(place(options))


def given_words(options: argparse.Namespace) -> list[str]:
    """The words by which another command asks the same control process."""
    host = asked_host(options)
    at = ["--host", host, *(["--socket", options.socket] if options.socket else [])]
    return at if host else ["--host", "", "--socket", str(asked_socket(options))]


def here_only(options: argparse.Namespace, why: str, remedy: str) -> None:
    """Nothing, for a command that works on this host, where the command line does not name another one.

    Raises:
        UsageError: it does (``NotRemote``).
    """
    named = ", ".join(filter(None, options.host or ())) or options.hosts
    if named:
        raise UsageError(f"the command cannot be run on {named} from here", why, remedy, code="NotRemote")


def asked_socket(options: argparse.Namespace) -> Path:
    """The control socket to ask: the one the command line names, else the nearest one that may be asked."""
    return Path(options.socket) if options.socket else paths.nearest_socket()


def socket_of(options: argparse.Namespace) -> Path:
    """The control socket the command line names, or the usual one (``$XDG_RUNTIME_DIR`` without root)."""
    return Path(options.socket) if options.socket else paths.control_socket()


def embedded(reason: str = "", *, record_s: float = 0) -> Control:
    """A control process inside this one; ``reason`` forbids actions; ``record_s``: it records a history, and stays."""
    from memconsole.backend.embedded import embedded as build

    return build(read_only=reason, record_s=record_s, brief=not record_s)


@contextmanager
def source(options: argparse.Namespace, *, need: Literal["read", "plan", "act"] = "read") -> Iterator[Source]:
    """The Source a command works on, closed when the command ends.

    Reading and planning fall back to this process when no control process answers; acting does not, because what it
    would reserve would vanish with this command: so acting is refused where ``--embedded`` asks for just that.

    Raises:
        NoControl: acting, and nothing answers.
        Refused: acting with ``--embedded`` (``NotKept``).
    """
    given = _given.get()
    if given is not None:
        yield ReadOnly(given, "--read-only was given") if options.read_only else given
        return
    found: Source
    if options.embedded and need == "act":
        raise Refused(
            "--embedded cannot act from the command line",
            "what a command reserves or starts in its own process ends with the command",
            "start the control process (memconsole serve) and leave --embedded out, or act in the console (memconsole"
            " --embedded), which keeps it for as long as it is open; --dry-run shows the plan",
            code="NotKept",
        )
    if options.embedded:
        here_only(options, "--embedded is this process", "leave one of the two out")
        found = embedded()
    elif asked_host(options):
        found = client(options)
    else:
        try:
            found = client(options)
        except NoControl as error:
            if need == "act":
                raise NoControl(
                    error.what,
                    error.why,
                    "open the console (memconsole) or start the control process (memconsole serve); what a lone command"
                    " reserves would vanish with it",
                ) from None
            found = embedded("" if need == "plan" else "no control process answers")
    try:
        yield ReadOnly(found, "--read-only was given") if options.read_only else found
    finally:
        found.close()


@contextmanager
def source_or_file(options: argparse.Namespace) -> Iterator[Source]:
    """The Source that a command only reads: the snapshot file that the command line names, else :func:`source`."""
    if not options.origin:
        with source(options) as found:
            yield found
        return
    from memconsole.recording import Recording

    with closing(Recording(options.origin)) as recorded:
        yield recorded
