"""A grant on its way to the process that maps it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from memconsole.model import Access


@dataclass(frozen=True)
class Offer:
    """A grant as a guest receives it: ``fd`` of the region's segment, byte ``offset`` and ``length`` in it, ``gpa``.

    ``wants``: what its userfaultfd is wanted for (``native/agent.h``); 0 for nothing. ``window``: it is no RAM, but the
    registers of a device.
    """

    grant: str
    fd: int
    offset: int
    length: int
    access: Access
    gpa: int | None
    wants: int = 0
    window: bool = False
