"""Files that are at their place whole or not at all, however the writing ends."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from memconsole import paths


@contextlib.contextmanager
def written(
    path: Path, *, mode: int | None = 0o600, owner: tuple[int, int] | None = None, lasting: bool = False
) -> Iterator[BinaryIO]:
    """A new file that takes the place of what is at ``path`` once the block ends without an error.

    Until then it lies beside it, under a name with a dot that no other writer has, and is removed where the block
    fails. ``mode`` (None: that of any new file) and ``owner`` (uid, gid) are its own before it has its name; a
    ``lasting`` one is on its disk, and so is its name, before this returns. Raises OSError.
    """
    draft = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_native_id()}")
    draft.unlink(missing_ok=True)  # of a process that had this number, and was killed
    fd = os.open(
        draft, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666 if mode is None else 0o600
    )
    try:
        with os.fdopen(fd, "r+b") as file:
            yield file
            file.flush()
            if owner is not None:
                os.fchown(file.fileno(), *owner)
            if mode is not None:
                os.fchmod(file.fileno(), mode)
            if lasting:
                os.fsync(file.fileno())
        draft.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            draft.unlink(missing_ok=True)
        raise
    if lasting:
        paths.sync_directory(path.parent)
