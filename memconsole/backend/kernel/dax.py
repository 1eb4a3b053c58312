"""devdax devices: /sys/bus/dax/devices/daxN.M/{size,resource,align,target_node,numa_node}."""

from __future__ import annotations

from functools import partial

from memconsole.backend.kernel import tree
from memconsole.backend.kernel.tree import Root
from memconsole.errors import Denied, NotFound
from memconsole.model import Dax, Unread

_DAX = "/sys/bus/dax/devices"


def dax(root: Root = "/", gaps: list[Unread] | None = None) -> tuple[Dax, ...]:
    """The devdax devices in order; ``size``, ``align`` and ``start`` in bytes, ``start`` 0 where it is not shown.

    One that is taken away meanwhile is left out.
    One that cannot be read is named in ``gaps``; without them it is raised.

    Raises:
        NotFound: this kernel has no dax bus.
        Denied, KernelRefused: they cannot be listed. BadFile, or these: without ``gaps``, one of them cannot be read.
    """
    return tuple(tree.each(root, _DAX, partial(_device, root), gaps))


def _device(root: Root, name: str) -> Dax:
    base = f"{_DAX}/{name}"
    return Dax(
        name=name,
        size=tree.number(root, f"{base}/size"),
        node=_optional(root, f"{base}/target_node", _optional(root, f"{base}/numa_node", -1)),
        align=_optional(root, f"{base}/align", 0),
        start=_optional(root, f"{base}/resource", 0),
    )


def _optional(root: Root, path: str, default: int) -> int:
    """A number that older kernels lack, or show to root only."""
    try:
        return tree.number(root, path)
    except (NotFound, Denied):
        return default
