"""KHO's tree of preserved pages.

    node    at levels 5 to 1: u64 table[512], physical addresses of nodes one level below; 0 is none
    leaf    at level 0: a bitmap of 32768 bits, u64 words, bit 0 first
    key     1 << (52 - order) | pa >> (12 + order); a preserved block of 2^order pages is one key
    index   at level L > 0: key >> (15 + 9 * (L - 1)) & 511; in a leaf: key & 32767

Keys are met in ascending order, so all blocks of one order come together, ascending; the highest orders come first.
The top level has room for keys of 60 bits, the order bit is bit 52 at most. Source: kho_radix_walk_tree.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

from memconsole.backend.kernel.handover.memory import PhysicalMemory, Walk
from memconsole.backend.kernel.handover.values import Preserved, Run
from memconsole.errors import BadFile

LEVELS = 6
ORDER_0 = 52
"""The order bit of a single page."""
_TABLE = struct.Struct("<512Q")
_LEAF_BITS, _TABLE_BITS = 15, 9
_FULL = (1 << 64) - 1
_FRAMES = 1 << 40


def walk(memory: PhysicalMemory, root: int) -> Preserved:
    """The set of frames that the tree at ``root`` preserves.

    Raises:
        BadFile: the tree is torn: a page met twice, no memory where one should be, a key that is none.
    """
    pages = Walk(memory)
    runs: list[Run] = []
    orders: dict[int, int] = {}
    leaves = 0
    for key, words in _leaves(pages, root):
        leaves += 1
        for first, count in _bits(words):
            _add(runs, orders, key + first, count)
    return Preserved(_joined(runs), dict(sorted(orders.items())), leaves)


def _leaves(pages: Walk, root: int) -> Iterator[tuple[int, tuple[int, ...]]]:
    """Every leaf, in order of keys: the key of its first bit, and its words."""
    stack = [(LEVELS - 1, 0, root)]
    while stack:
        level, key, address = stack.pop()
        words = _TABLE.unpack(pages.page(address, "the tree of preserved pages"))
        if level == 0:
            yield key, words
            continue
        shift = _LEAF_BITS + _TABLE_BITS * (level - 1)
        stack.extend((level - 1, key | index << shift, words[index]) for index in range(511, -1, -1) if words[index])


def _bits(words: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """Runs of set bits in a leaf: the first bit and how many, never across words (neighbours are joined later)."""
    for index, whole in enumerate(words):
        if whole == _FULL:
            yield index * 64, 64
            continue
        bit, word = index * 64, whole
        while word:
            zeros = (word & -word).bit_length() - 1
            word >>= zeros
            ones = (~word & word + 1).bit_length() - 1
            yield bit + zeros, ones
            bit += zeros + ones
            word >>= ones


def _add(runs: list[Run], orders: dict[int, int], key: int, count: int) -> None:
    """Blocks of consecutive keys, joined to what precedes them."""
    top = key.bit_length() - 1
    order = ORDER_0 - top
    if order < 0 or top < 0 or (key + count - 1).bit_length() - 1 != top:
        raise BadFile("the tree of preserved pages is corrupt", f"{key:#x} is no key")
    pfn = (key - (1 << top)) << order
    pages = count << order
    if pfn + pages > _FRAMES:
        raise BadFile("the tree of preserved pages is corrupt", f"{key:#x} is beyond any memory")
    orders[order] = orders.get(order, 0) + count
    if runs and runs[-1].pfn + runs[-1].count == pfn:
        runs[-1] = Run(runs[-1].pfn, runs[-1].count + pages)
    else:
        runs.append(Run(pfn, pages))


def _joined(runs: list[Run]) -> tuple[Run, ...]:
    """The runs of all orders in order of pfn; those that touch or overlap are one."""
    found: list[Run] = []
    for pfn, count in sorted(runs):
        if found and pfn <= found[-1].pfn + found[-1].count:
            last = found[-1]
            found[-1] = Run(last.pfn, max(last.count, pfn + count - last.pfn))
        else:
            found.append(Run(pfn, count))
    return tuple(found)
