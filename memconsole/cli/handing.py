"""``handoff check`` and ``handoff report``; what acts (``run``, ``rehearse``) is in the registry of actions."""

from __future__ import annotations

import argparse
import contextlib
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from msgspec.structs import replace

from memconsole import readiness, timeline, unforeseen
from memconsole.actions import HandoffRun
from memconsole.cli import output
from memconsole.cli.connect import source
from memconsole.errors import ExitCode, MemconsoleError, NotFound
from memconsole.model import Condition
from memconsole.source import Source

LOOK_S = 0.25


def check(options: argparse.Namespace) -> int:
    """Every condition of a handoff; exit code 3 when one refuses it, or when the kernel that was not to run runs."""
    action = HandoffRun(options.kernel, options.initrd, options.append)
    with source(options, need="plan") as found:
        plan = found.plan(action)
    running = options.unless_running and plan.from_kernel != "" and plan.from_kernel == plan.to_kernel
    if options.json and not options.quiet:
        output.json(plan.conditions)
    elif not options.quiet:
        output.conditions(plan.conditions, every=True)
        output.text(f"there is nothing to do: {plan.from_kernel} runs" if running else _verdict(plan.conditions))
    return ExitCode.REFUSED if running or any(each.refuses for each in plan.conditions) else ExitCode.DONE


def status(options: argparse.Namespace) -> int:
    """Whether this host is ready for a handoff, in one line; exit code 3 when it is not, 1 when that is not known."""
    with source(options) as found:
        snapshot = found.snapshot()
        if snapshot.readiness is None and not found.read_only:
            snapshot = replace(snapshot, readiness=readiness.judge(found.plan))
    if options.json:
        words = {"host": snapshot.host.name, "verdict": readiness.verdict(snapshot.readiness)}
        output.json({**words, "readiness": snapshot.readiness})
    else:
        output.text(readiness.line(snapshot))
    return {
        readiness.Verdict.READY: ExitCode.DONE,
        readiness.Verdict.REFUSED: ExitCode.REFUSED,
        readiness.Verdict.UNKNOWN: ExitCode.FAILED,
    }[readiness.verdict(snapshot.readiness)]


def _verdict(conditions: tuple[Condition, ...]) -> str:
    refusing = sum(each.refuses for each in conditions)
    warning = sum(not each.ok for each in conditions) - refusing
    if refusing:
        return f"a handoff is refused by {refusing} of {len(conditions)} conditions"
    return f"a handoff can be made; {warning} of {len(conditions)} conditions warn"


def report(options: argparse.Namespace) -> int:
    """The last handoff: phases, each guest's blackout, regions; exit code 4 when not everything came back."""
    with source(options) as found:
        made = found.snapshot().handoff
    if made is None:
        raise NotFound(
            "there is no handoff to report on",
            "none was made since this memory was reserved",
            "memconsole handoff rehearse makes one",
        )
    if options.picture:
        try:
            Path(options.picture).write_text(timeline.svg(made), encoding="utf-8")
        except OSError as error:
            raise MemconsoleError(
                f"{options.picture} cannot be written", error.strerror or str(error), "give another path"
            ) from None
    if options.json:
        output.json(made)
    else:
        output.handoff(made)
    whole = (
        all(guest.back for guest in made.guests)
        and all(region.same is not False for region in made.regions)
        and all(device.same for device in made.devices)
    )
    return ExitCode.DONE if whole and not made.why else ExitCode.FINDINGS


@contextlib.contextmanager
def told(found: Source) -> Iterator[None]:
    """While a handoff is under way each phase of it goes to stderr as it begins, up to the blackout.

    From then on nobody looks: whoever takes the control process's time lengthens it. ``handoff report`` has the rest.
    """
    last = found.snapshot().handoff
    over = threading.Event()
    teller = unforeseen.thread("memconsole-phases", partial(_tell, found, last.began_ns if last else 0, over))
    teller.start()
    try:
        yield
    finally:
        over.set()
        teller.join()


def _tell(found: Source, before: int, over: threading.Event) -> None:
    told = 0
    while not over.wait(LOOK_S):
        try:
            made = found.snapshot().handoff
        except MemconsoleError:  # who waits for the handoff hears of it
            return
        if made is None or made.began_ns == before:
            continue
        for phase in made.phases[told:]:
            output.note(f"{phase.start_ns / 1e9:7.2f} s  {phase.text}")
            if phase.blackout:
                return
        told = len(made.phases)
