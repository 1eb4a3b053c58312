"""What QEMU says of its memory, as QEMU 10.0 says it (shortened), and what is none of it."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import pytest

from memconsole.backend.managers import guest_memory
from memconsole.backend.managers.guest_memory import Block, BlockPart, MemoryBackend
from memconsole.decoding import Undecodable
from memconsole.errors import GuestError

M, G = 1 << 20, 1 << 30
TREE = """FlatView #0
 AS "mch", root: bus master container
 Root memory region: (none)
  No rendered FlatView

FlatView #1
 AS "cpu-smm-1", root: memory
 Root memory region: memory
  0000000000000000-00000000000bffff (prio 0, ram): somewhere else

FlatView #2
 AS "cpu-memory-0", root: system
 AS "memory", root: system
 Root memory region: system
  0000000000000000-00000000000bffff (prio 0, ram): pc.ram KVM
  00000000000c0000-00000000000dffff (prio 1, rom): pc.rom
  00000000000e0000-00000000000fffff (prio 0, rom): pc.bios @0000000000020000
  0000000000100000-000000007fffffff (prio 0, ram): pc.ram @0000000000100000 KVM
  00000000fec00000-00000000fec00fff (prio 0, i/o): ioapic
  00000000fee00000-00000000feefffff (prio 4096, i/o): apic-msi
  0000000100000000-00000001ffffffff (prio 0, ram): pc.ram @0000000080000000 KVM
  0000000240000000-0000000247ffffff (prio 0, nv-ram): /objects/memnvdimm1

FlatView #3
 AS "device-memory", root: device-memory
 Root memory region: memdimm0
  0000000000000000-0000000007ffffff (prio 0, ram): memdimm0
"""
LOW, HIGH = BlockPart(0, 0, 2 * G), BlockPart(4 * G, 2 * G, 4 * G)


def monitor(migration: str = "", **answers: Any) -> guest_memory.Ask:
    """A QEMU of 6 GiB, an nvdimm, and a backend that no device uses."""

    def ask(command: str, arguments: Mapping[str, object]) -> Any:
        line = str(arguments.get("command-line", command))
        said = {
            "query-migrate": {"status": migration} if migration else {},
            "query-memdev": [
                {"id": "memnvdimm1", "size": 128 * M, "share": True, "policy": "default"},
                {"id": "pc.ram", "size": 6 * G, "share": True, "policy": "default"},
                {"id": "spare", "size": M, "share": False},
            ],
            "info mtree -f": TREE.replace("\n", "\r\n"),
            "gpa2hva 0x0": "Host virtual address for 0x0 (pc.ram) is 0x7efd6dfff000\r\n",
            "gpa2hva 0x240000000": "Host virtual address for 0x240000000 (/objects/memnvdimm1) is 0x7efd00000000",
        } | answers
        return said[line]

    return ask


def test_blocks_are_told_by_address_with_their_parts_and_where_they_are_mapped() -> None:
    assert guest_memory.blocks(monitor()) == (
        Block("pc.ram", 6 * G, True, 0x7EFD6DFFF000, (LOW, HIGH)),
        Block("memnvdimm1", 128 * M, True, 0x7EFD00000000, (BlockPart(9 * G, 0, 128 * M),), nv=True),
    )


def test_what_lies_over_a_block_does_not_divide_it() -> None:
    rows = [BlockPart(M, M, M), BlockPart(0, 0, 0xA0000), BlockPart(4 * G, 2 * M, M)]
    assert guest_memory.merged(rows) == (BlockPart(0, 0, 2 * M), BlockPart(4 * G, 2 * M, M))


@pytest.mark.parametrize("status", ["active", "setup", "postcopy-paused"])
def test_a_guest_on_its_way_elsewhere_is_not_looked_at(status: str) -> None:
    with pytest.raises(GuestError) as told:
        guest_memory.blocks(monitor(status))
    assert told.value.code == "JobUnderWay"
    assert guest_memory.blocks(monitor("completed"))


@pytest.mark.parametrize(
    "answers",
    [
        {"info mtree -f": ""},
        {"info mtree -f": TREE.replace('AS "memory"', 'AS "other"')},
        {"info mtree -f": TREE.replace("(prio 0, ram): pc.ram KVM", "prio 0 ram pc.ram")},
        {"info mtree -f": TREE.replace("00000000000bffff", "00000000000bffffg")},
        {"info mtree -f": 7},
        {"gpa2hva 0x0": "Memory at address 0x0 is not RAM"},
        {"gpa2hva 0x0": "Host virtual address for 0x0 (other) is 0x7efd6dfff000"},
        {"query-memdev": [{"id": 7}]},
        {"query-memdev": "none"},
        {"query-migrate": []},
    ],
)
def test_an_answer_that_is_not_understood_is_an_error_by_name(answers: dict[str, Any]) -> None:
    with pytest.raises(Undecodable):
        guest_memory.blocks(monitor(**answers))


def test_whatever_a_tree_of_memory_says_only_a_named_error_comes_of_it() -> None:
    seed = random.Random(7)
    for _ in range(400):
        rows = list(TREE)
        for _ in range(seed.randrange(1, 6)):
            at = seed.randrange(len(rows))
            rows[at] = seed.choice(["", "\n", "0", "f", "@", "(", '"', " ", "\0", "é"])
        try:
            found = guest_memory.flat_view("".join(rows))
        except Undecodable:
            continue
        assert all(part.size > 0 for parts in found.values() for part, _ in parts)


def test_the_command_line_names_memory_backends_in_both_ways_of_writing() -> None:
    json = '{"qom-type":"memory-backend-memfd","id":"pc.ram","share":true,"size":1024}'
    words = ("qemu", "-object", json, "-object", "memory-backend-file,id=m1,mem-path=/x,,y,share=on")
    more = (
        "-object",
        "memory-backend-ram,size=1G,id=m2",
        "-object",
        "rng-random,id=r",
        "-object",
        '{"qom-type":"secret"}',
    )
    assert guest_memory.backends((*words, *more)) == (
        MemoryBackend("pc.ram", "memory-backend-memfd", True),
        MemoryBackend("m1", "memory-backend-file", True),
        MemoryBackend("m2", "memory-backend-ram", False),
    )
    with pytest.raises(Undecodable):
        guest_memory.backends(("-object", "{"))
