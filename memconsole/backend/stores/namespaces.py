"""A range of persistent memory made a devdax device, with sysfs alone: what ``ndctl create-namespace -m devdax`` does.

/sys/bus/nd/drivers/nd_pmem/{bind,unbind}     the driver that shows a namespace as a block device
/sys/bus/nd/devices/REGION/dax_seed           the nd device that is to become one
/sys/bus/nd/devices/SEED/{align,uuid,mode,namespace}
/sys/bus/nd/drivers/dax_pmem/bind             writes an info block to the range, by which every later kernel knows it
"""

from __future__ import annotations

import contextlib
import os
import re
import uuid
from pathlib import Path

from memconsole.backend.kernel import tree
from memconsole.backend.kernel.pmem import Pmem
from memconsole.backend.kernel.tree import Root
from memconsole.backend.stores import ranges
from memconsole.backend.stores.described import UNIT
from memconsole.backend.stores.ranges import Range
from memconsole.errors import KernelRefused, MemconsoleError, NotFound

_DRIVERS, _DEVICES = "/sys/bus/nd/drivers", "/sys/bus/nd/devices"
_NAMESPACE = re.compile(r"namespace\d{1,9}\.\d{1,9}")
_SEED = re.compile(r"dax\d{1,9}\.\d{1,9}")


def as_devdax(device: Pmem, root: Root = "/") -> Range:
    """Have a range be a devdax device; where that fails it is the block device that it was.

    Raises:
        KernelRefused: the kernel will not. NotFound, Denied: it has no devdax, or does not show what is needed.
    """
    if not _NAMESPACE.fullmatch(device.namespace):
        why = f"its namespace is {device.namespace or 'none'}"
        raise NotFound(f"{device.path} cannot become a devdax device", why, "use a range of memmap=nn!ss")
    region = Path(os.path.realpath(tree.below(root, f"{_DEVICES}/{device.namespace}"))).parent.name
    seed = tree.line(root, f"{_DEVICES}/{region}/dax_seed")
    if not _SEED.fullmatch(seed):
        raise tree.malformed(f"{_DEVICES}/{region}/dax_seed", seed)
    _write(root, f"{_DRIVERS}/nd_pmem/unbind", device.namespace)
    try:
        for name, value in {
            "align": str(UNIT),
            "uuid": str(uuid.uuid4()),
            "mode": "ram",
            "namespace": device.namespace,
        }.items():
            _write(root, f"{_DEVICES}/{seed}/{name}", value)
        _write(root, f"{_DRIVERS}/dax_pmem/bind", seed)
        return _made(device, root)
    except BaseException:
        with contextlib.suppress(MemconsoleError):
            _write(root, f"{_DEVICES}/{seed}/namespace", "")
        with contextlib.suppress(MemconsoleError):
            _write(root, f"{_DRIVERS}/nd_pmem/bind", device.namespace)
        raise


def _made(device: Pmem, root: Root) -> Range:
    """The devdax device in a range: by where it is, for the kernel numbers such devices anew at every boot."""
    first = device.start or 0
    for each in ranges.devdax(root):
        if each.start is not None and first <= each.start < first + device.size:
            return each
    why = "the kernel made none of it (CONFIG_DEV_DAX, DEV_DAX_PMEM)"
    raise NotFound(f"{device.path} did not become a devdax device", why, "see dmesg")


def _write(root: Root, path: str, value: str) -> None:
    try:
        with open(tree.below(root, path), "w", encoding="ascii") as file:  # noqa: PTH123 - of sysfs
            file.write(value)
    except OSError as error:
        raise KernelRefused(path, error.errno or 0, what=f"{path} does not take {value or 'nothing'}") from None
