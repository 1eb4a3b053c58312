"""What the modules of this collection say alike of their options."""

from __future__ import annotations


class ModuleDocFragment:
    """How memconsole is asked, and which kernel is meant."""

    DOCUMENTATION = r"""
options:
  executable:
    description: The command to run on the host, by its name or its path.
    type: path
    default: memconsole
  socket:
    description: The socket of the control process; the usual one if left out.
    type: path
requirements:
  - memconsole on the host, of the version of this collection or newer
author:
  - the memconsole developers (!UNKNOWN)
"""

    KERNEL = r"""
options:
  kernel:
    description: Image of the next kernel; what the host boots by itself if left out.
    type: str
  initrd:
    description: Initrd of the next kernel, or V(none) where it needs none; the image's own if left out.
    type: str
  append:
    description: Command line of the next kernel; that of the running one if left out.
    type: str
"""
