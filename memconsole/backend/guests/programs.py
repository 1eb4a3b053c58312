"""What is known of programs that keep data in memory: whether they come up warm, and what they want for it.

By a process's own words (/proc/PID/cmdline). Sources: memcached's doc/restart.txt, and what each program's manual says
of its memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import PurePath
from typing import NamedTuple


class Program(NamedTuple):
    """A program that was recognised; ``cold``: why it starts without its data, empty where nothing speaks against it.

    ``instead``: what it can do. ``clock``: it starts cold where the clock is not past the second in which it saved.
    """

    name: str
    cold: str = ""
    instead: str = ""
    clock: bool = False


_IN_A_VM = "run it in a guest (memconsole guest start NAME --vmm qemu): a VM is carried as it is"
_HEAP = "its data lies in its own heap, which ends with it"
_SNAPSHOT = f"have it write its snapshot before ({{}}), which it loads afterwards; or {_IN_A_VM}"
_BUFFERS = "its buffers are shared memory that it makes anew when it starts"

_COLD = {
    "redis-server": (_HEAP, _SNAPSHOT.format("--save 'redis-cli save'")),
    "valkey-server": (_HEAP, _SNAPSHOT.format("--save 'valkey-cli save'")),
    "keydb-server": (_HEAP, _SNAPSHOT.format("--save 'keydb-cli save'")),
    "dragonfly": (_HEAP, _SNAPSHOT.format("--save 'redis-cli save'")),
    "postgres": (_BUFFERS, f"let pg_prewarm (autoprewarm) read them again; or {_IN_A_VM}"),
    "mysqld": (_BUFFERS, f"innodb_buffer_pool_dump_at_shutdown has it read them again; or {_IN_A_VM}"),
    "mariadbd": (_BUFFERS, f"innodb_buffer_pool_dump_at_shutdown has it read them again; or {_IN_A_VM}"),
}


def recognised(words: Sequence[str], save_signal: str = "") -> Program | None:
    """The program that a process's words are of, told with ``save_signal`` (empty: nothing); None if unknown.

    A server that writes what it does over its words (``redis-server *:6379``, ``postgres: checkpointer``) is known too.
    """
    name = PurePath(words[0].split(" ")[0].rstrip(":")).name if words and words[0] else ""
    if name == "memcached":
        return _memcached(words, save_signal)
    if name in _COLD:
        return Program(name, *_COLD[name])
    return None


def _memcached(words: Sequence[str], save_signal: str) -> Program:
    if not any(word.startswith(("-e", "--memory-file")) for word in words[1:]):
        instead = "start it with -e FILE on the mount, and -m of the region's size in MiB"
        return Program("memcached", "its items are in memory of its own", instead)
    if save_signal != "SIGUSR1":
        why = "it writes down where its items are at SIGUSR1 alone"
        return Program("memcached", why, "have it told: --save-signal SIGUSR1", clock=True)
    return Program("memcached", clock=True)
