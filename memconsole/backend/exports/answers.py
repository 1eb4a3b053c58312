"""What agents answer: DONE, REPORTED and SWEPT of the grammar in :mod:`memconsole.backend.exports.agents`."""

from __future__ import annotations

from typing import NamedTuple

from memconsole import agent as wire
from memconsole import decoding
from memconsole.agent import BadMessage, Type
from memconsole.model import Progress

_STATES = {1: "running", 2: "paused", 3: "failed"}


class AgentReply(NamedTuple):
    """What a guest answered: ``status`` 0 or an errno, its words; to REPORT its state, progress and how often it was
    restored, last after how long; to SWEEP the pages it checked and the bytes that are wrong.
    """

    status: int
    text: str
    state: str = ""
    progress: Progress | None = None
    restored: int = 0
    blackout_ns: int = 0
    pages: int = 0
    wrong: int = 0


def read(message: wire.Message) -> AgentReply:
    """The answer in a message of an agent.

    Raises:
        BadMessage: it does not follow the grammar of :mod:`memconsole.backend.exports.agents`.
    """
    if message.type is Type.DONE and len(message.body) >= wire.DONE.size:
        status, _, text = wire.DONE.unpack_from(message.body)
        return AgentReply(status, _text(text))
    if message.type is Type.REPORTED and len(message.body) >= wire.REPORTED.size:
        runs_as, state, beats, checked, wrong, gap_ns, gaps, restored, blackout_ns, text = wire.REPORTED.unpack_from(
            message.body
        )
        if runs_as not in {1, 2} or state not in _STATES:
            raise BadMessage("a report of nothing known")
        why = _text(text)
        progress = Progress("kvm" if runs_as == 1 else "process", beats, checked, wrong, gap_ns, gaps, why)
        return AgentReply(0, why, _STATES[state], progress, restored, blackout_ns)
    if message.type is Type.SWEPT and len(message.body) >= wire.SWEPT.size:
        pages, wrong, _ = wire.SWEPT.unpack_from(message.body)
        return AgentReply(0, "", pages=pages, wrong=wrong)
    raise BadMessage(f"a malformed {Type(message.type).name}")


def _text(raw: bytes) -> str:
    return decoding.text(raw.partition(b"\0")[0])
