"""What the entries of custody are called."""

from __future__ import annotations

MOUNT = "mount"
"""The table of files on the mount."""
LANDED = "landed"
"""The record of a resume, once a control process has used it: memconsole-resume then starts nothing."""


def custody_name(region: str, segment: int) -> str:
    """A region's segment."""
    return f"region:{region}:{segment}"
