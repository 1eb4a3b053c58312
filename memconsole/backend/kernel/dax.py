"""devdax devices: /sys/bus/dax/devices/daxN.M/{size,resource,align,target_node,numa_node}."""

from __future__ import annotations

from memconsole.backend.kernel import tree
from memconsole.backend.kernel.tree import Root
from memconsole.errors import Denied, NotFound
from memconsole.model import Dax

_DAX = "/sys/bus/dax/devices"


def dax(root: Root = "/") -> tuple[Dax, ...]:
    """The devdax devices in order; ``size``, ``align`` and ``start`` in bytes, ``start`` 0 where it is not shown.

    Raises:
        NotFound: this kernel has no dax bus.
        Denied, KernelRefused, BadFile: a device cannot be read.
    """
    return tuple(_device(root, name) for name in tree.names(root, _DAX))


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
