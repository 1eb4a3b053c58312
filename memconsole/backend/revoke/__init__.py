"""Taking a mapping back while the contents stay: the ladder, mildest rung first.

    ask      the guest's agent unmaps the range and closes its fd
    protect  its page table entries are taken away through the userfaultfd it handed over: an access waits for ever
    copy     the contents move to fresh frames; the old file is emptied: an access is SIGBUS for ever
    kill     every process the kernel shows to reach it is killed: the guest, its children, whoever got the fd

After each rung the kernel is asked who still reaches any of the segment the range lies in, for its descriptor reaches
all of it (:mod:`~memconsole.backend.observe.reach`), and the ladder ends when nobody does. How strong that end is, the
frames say (:mod:`.pins`):

    cut          no mapping is left, and no fd of what holds the contents
    proved       and no pin: every frame the process could have pinned is free again, or somebody else's
    quarantined  pins hold some of the old frames: those are nobody's until the pins drop

``cut`` is enough where only a VM of ours was involved: what runs in it is ours. Any other process may have handed pages
to a pipe, an io_uring or a device, or the fd to somebody in whose socket it still waits. So after its grant was taken
back by whatever rung, the contents are moved to fresh frames (:mod:`.move`) wherever they can be had.

Fault points besides those of the verb's steps are :data:`POINTS`.
"""

from __future__ import annotations

from memconsole.backend.revoke.ladder import Ladder, Revoking
from memconsole.backend.revoke.points import POINTS

__all__ = ["POINTS", "Ladder", "Revoking"]
