"""The command line: it builds Actions, asks for Snapshots and starts the console; textual is imported by no other.

``main`` parses, runs one command and turns every error into its sentence and its exit code. Commands live next to it:
``listing`` (tables and maps), ``acting`` (Actions), ``macroing`` (macros), ``files`` (snapshot, diff, schema), ``past``
(history, inspect), ``hosting`` (console, demo, doctor); ``output`` alone writes to stdout, ``connect`` alone decides
whom to talk to.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from itertools import pairwise

from memconsole.errors import ExitCode, MemconsoleError


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code (see :class:`memconsole.errors.ExitCode`)."""
    if "_ARGCOMPLETE" in os.environ:
        from memconsole.cli import completing

        completing.answer()
    from memconsole import unforeseen
    from memconsole.cli import output
    from memconsole.cli.parser import parse

    words = list(sys.argv[1:] if argv is None else argv)
    as_json = "--json" in words or "--format=json" in words or ("--format", "json") in pairwise(words)
    try:
        options = parse(words)
        code = options.run(options)
        sys.stdout.flush()
    except MemconsoleError as error:
        output.failure(error, as_json=as_json)
        return int(error.exit_code)
    except KeyboardInterrupt:
        return int(ExitCode.INTERRUPTED)
    except BrokenPipeError:
        # Whoever read our output has gone; so that the interpreter's last flush finds no broken pipe again:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return int(ExitCode.DONE)
    except Exception as error:  # noqa: BLE001 - the trace goes to stderr, by the log
        failed = unforeseen.named(error, "memconsole", "call")
        output.failure(failed, as_json=as_json)
        return int(failed.exit_code)
    return int(code)
