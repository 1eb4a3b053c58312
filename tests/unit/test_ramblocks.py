"""The names of a block of RAM: QEMU's, its stream's, its region's, each kept as it is."""

from __future__ import annotations

from pathlib import Path

import pytest
from msgspec.structs import replace
from support.desks import Facts, desk_of, grant, guest, region

from memconsole.backend.guests import ramblocks
from memconsole.backend.guests.ramblocks import region_name
from memconsole.backend.handoff import carried
from memconsole.backend.managers.migration import Elsewhere
from memconsole.errors import GuestError
from memconsole.model import GuestKind

LONG = "memua-database-hot-0"
_AT = "0x0000000000000000 0x0000000001000000 0x0000000001000000 0x00007f8fdbe00000  rw"
RAMBLOCK = f"""              Block Name    PSize              Offset               Used    Total  HVA  RO
      /objects/ram-node0    4 KiB  {_AT}
{LONG:>24}    4 KiB  {_AT}
"""


def test_the_stream_is_asked_what_it_calls_a_block() -> None:
    names = ramblocks.stream_names(lambda _command, _arguments: RAMBLOCK)
    assert names == {"/objects/ram-node0", LONG}
    assert ramblocks.stream_name("web", "ram-node0", names) == "/objects/ram-node0"
    assert ramblocks.stream_name("web", LONG, names) == LONG
    with pytest.raises(GuestError, match=r"block ram-node1 of guest web is not known"):
        ramblocks.stream_name("web", "ram-node1", names)


def test_regions_of_long_names_that_begin_alike_are_two() -> None:
    names = {region_name("web", each) for each in ("memua-database-hot-0", "memua-database-hot-1")}
    assert len(names) == 2
    assert {len(each.partition(".")[2]) for each in names} == {14}
    assert region_name("web", "pc.ram") == "web.pc.ram"


def test_what_is_carried_has_the_names_that_qemu_and_its_stream_have(tmp_path: Path) -> None:
    cell, long = region("web.ram-node0"), region(region_name("web", LONG))
    facts = Facts(
        regions=(replace(cell, block="ram-node0"), replace(long, block=LONG)),
        guests=(guest("web", GuestKind.FOREIGN),),
        grants=tuple(grant(f"g{n}", region=each.name, guest="web") for n, each in enumerate((cell, long))),
    )
    with desk_of(tmp_path, facts) as desk:
        found = carried.blocks_of(desk, desk.state.guests["web"], ("/objects/ram-node0", LONG, "pc.bios"))
    assert [(each.name, each.region, each.elsewhere()) for each in found] == [
        (LONG, long.name, Elsewhere(LONG, long.size)),
        ("ram-node0", cell.name, Elsewhere("/objects/ram-node0", cell.size)),
    ]
