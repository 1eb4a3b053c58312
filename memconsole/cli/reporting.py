"""Commands that write a report: of an audit for people, of a fault for those who mend it."""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import platform
import sys
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec

from memconsole import __version__, decoding, document, paths, readiness
from memconsole import report as audit
from memconsole.actions import HandoffRun
from memconsole.cli import output
from memconsole.cli.connect import source, source_or_file
from memconsole.cli.files import put
from memconsole.errors import BadFile, ExitCode, MemconsoleError, UsageError
from memconsole.redaction import RedactedSource, Redactor
from memconsole.source import Source

LOG_BYTES = 1 << 20
"""Of each log, the last so many bytes."""
LOGS = ("serve.log", "serve.log.1", "console.log")


def report(options: argparse.Namespace) -> int:
    """An audit as one page."""
    form = options.format or _format_of(options.output)
    with source_or_file(options) as given:
        found: Source = RedactedSource(given) if options.redact else given
        taken = found.snapshot()
        if taken.readiness is None and not found.read_only:
            taken = msgspec.structs.replace(taken, readiness=readiness.judge(found.plan))
        title, blocks = audit.of(found, taken)
        put(options.output, document.FORMATS[form](title, blocks))
    return ExitCode.DONE


def _format_of(path: str | None) -> str:
    """The format that a file's name asks for; HTML without a file.

    Raises:
        UsageError: it asks for none.
    """
    suffix = Path(path).suffix.lower() if path else ".html"
    if suffix not in document.SUFFIXES:
        known = ", ".join(document.SUFFIXES)
        raise UsageError(
            f"{path} has no format",
            "a report is written as its name ends",
            f"choose a name with one of these suffixes: {known}",
        )
    return document.SUFFIXES[suffix]


def bugreport(options: argparse.Namespace) -> int:
    """Everything that a report of a fault wants, in one compressed archive."""
    path = Path(options.output)
    try:
        with path.open("xb") as file, tarfile.open(fileobj=file, mode="w:gz") as archive:
            os.fchmod(file.fileno(), 0o600)
            for name, text in _parts(options):
                _add(archive, name, text)
                output.text(f"{name}: {len(text):,} bytes")
    except FileExistsError:
        raise BadFile(f"{path} exists already", "a report does not overwrite a file", "give another name") from None
    except OSError as error:
        raise BadFile(f"{path} cannot be written", str(error), "give another path") from None
    output.text(f"{path} is written; only this user can read it")
    if not options.no_logs:
        output.note("its logs keep names of what is long gone: read them before you send it on")
    return ExitCode.DONE


def _add(archive: tarfile.TarFile, name: str, text: bytes) -> None:
    about = tarfile.TarInfo(f"memconsole-bugreport/{name}")
    about.size, about.mtime, about.mode = len(text), int(time.time()), 0o600
    archive.addfile(about, io.BytesIO(text))


def _parts(options: argparse.Namespace) -> Iterator[tuple[str, bytes]]:
    """The files of the report: what cannot be had is a file that says why."""
    yield "versions.json", _json(_versions())
    redactor = Redactor()
    try:
        with source(options, need="plan") as found:
            taken = found.snapshot()
            yield "snapshot.json", _json(redactor.snapshot(taken))
            yield "conditions.json", _json(redactor.value(found.plan(HandoffRun()).conditions))
    except MemconsoleError as error:
        yield "snapshot.error.txt", f"{redactor.text(str(error))}\n".encode()
    yield from _doctor(redactor)
    yield from _checked(redactor)
    if not options.no_logs:
        yield from _logs(redactor)


def _json(value: object) -> bytes:
    return document.indented(value).encode()


def _versions() -> dict[str, str]:
    kernel = os.uname()
    return {
        "memconsole": __version__,
        "python": sys.version,
        "kernel": f"{kernel.release} {kernel.version} {kernel.machine}",
        "libc": " ".join(platform.libc_ver()),
        "euid": str(os.geteuid()),
        "terminal": os.environ.get("TERM", ""),
    }


def _doctor(redactor: Redactor) -> Iterator[tuple[str, bytes]]:
    from memconsole.backend.diagnose.doctor import doctor

    try:
        yield "doctor.json", _json(redactor.value(tuple(doctor("/"))))
    except MemconsoleError as error:
        yield "doctor.error.txt", f"{redactor.text(str(error))}\n".encode()


def _checked(redactor: Redactor) -> Iterator[tuple[str, bytes]]:
    """Whether the ledger, the audit trail, the history and what this kernel was handed are whole."""
    from memconsole.backend.diagnose.inspect import describe, describe_kernel

    state = paths.state_dir()
    kept = sorted({*state.glob("*.sqlite"), *(state / "history").glob("*")})
    for name, files in (("ledger", _ledgers()), ("state", [path for path in kept if path.is_file()])):
        for number, file in enumerate(files):
            try:
                found = describe(file)
            except MemconsoleError as error:
                yield f"{name}-{number}.error.txt", f"{redactor.text(str(error))}\n".encode()
            else:
                yield f"{name}-{number}.json", _json(redactor.value(found))
    try:
        yield "kernel.json", _json(redactor.value(describe_kernel()))
    except MemconsoleError as error:
        yield "kernel.error.txt", f"{redactor.text(str(error))}\n".encode()


def _ledgers() -> list[Path]:
    """The memfds of ledgers, as a process that holds one shows it; each once, by device and inode."""
    found: dict[tuple[int, int], Path] = {}
    for directory in Path("/proc").glob("[0-9]*/fd"):
        with contextlib.suppress(OSError):  # it ended, or is not this user's
            for fd in directory.iterdir():
                if "memfd:memconsole-ledger" in str(fd.readlink()):
                    status = fd.stat()
                    found.setdefault((status.st_dev, status.st_ino), fd)
    return list(found.values())


def _logs(redactor: Redactor) -> Iterator[tuple[str, bytes]]:
    """The ends of the logs, with pseudonyms for all names that the Snapshot and its events know."""
    for name in LOGS:
        path = paths.state_dir() / name
        try:
            with path.open("rb") as file:
                file.seek(max(0, path.stat().st_size - LOG_BYTES))
                lines = decoding.text(file.read(LOG_BYTES)).splitlines()
            yield f"logs/{name}", "".join(f"{redactor.text(line)}\n" for line in lines).encode()
        except FileNotFoundError:
            continue
        except OSError as error:
            yield f"logs/{name}.error.txt", f"{error}\n".encode()
