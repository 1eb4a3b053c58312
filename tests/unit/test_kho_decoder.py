"""The decoder of handovers: whole structures are read as written, torn ones are named, and work is bounded."""

from __future__ import annotations

import random
import shutil
import struct
import subprocess
from contextlib import suppress
from pathlib import Path

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import handover_image as image
from support.handover_image import PAGE, Cells, u64

from memconsole.backend.kernel.handover import decode, describe, fdt, radix, records
from memconsole.backend.kernel.handover.values import FolioRun, Handover, Run
from memconsole.cli import main
from memconsole.errors import BadFile, ExitCode, NotFound

STRINGS = image.STRINGS
BLOCK = st.integers(0, 10).flatmap(
    lambda order: st.tuples(st.integers(0, 1 << 20).map(lambda n: n << order), st.just(order))
)


def whole(memory: Cells | None = None) -> tuple[Cells, bytes]:
    """Memory with one of everything, and its root tree."""
    memory = memory or Cells()
    tree = image.radix(memory, [(0x1000, 0), (0x1001, 0), (0x1200, 9), (0x9000, 3)])
    small = image.memfd(memory, 3 * PAGE + 5, [(n, 0x5000 + n, 3) for n in range(4)], seals=2)
    large = image.memfd(memory, 4 << 20, [(0, 0x1200, 1), (512, 0x8000, 1)])
    sessions = {
        "memconsole:a": [("memfd-v2", 1, small), ("vfio-v1", 2, 0x1234)],
        "memconsole:b": [("memfd-v2", 7, large)],
        "empty": [],
    }
    blobs = {
        "LUO": image.luo(memory, sessions, [("iommu-v1", 0x99, 2)]),
        "kexec-metadata": image.metadata("7.3.4-lab", 4),
        "memblock": image.fdt(
            {"compatible": b"memblock-v1\0"},
            {"trace": {"compatible": b"reserve-mem-v1\0", "start": u64(1 << 30), "size": u64(1 << 20)}},
        ),
        "unheard-of": b"\xff" * 100,
    }
    return memory, image.root(memory, tree, blobs)


def test_everything_is_read_as_written() -> None:
    memory, blob = whole()
    found = decode(blob, memory, "out")
    assert not found.gaps
    assert [(each.name, each.kind) for each in found.blobs] == [
        ("LUO", "luo-v5"),
        ("kexec-metadata", "kexec-metadata-v1"),
        ("memblock", "memblock-v1"),
        ("unheard-of", "opaque"),
    ]
    assert found.metadata is not None
    assert (found.metadata.previous_release, found.metadata.kexec_count) == ("7.3.4-lab", 4)
    assert [(each.start, each.end, each.name) for each in found.reserved] == [(1 << 30, (1 << 30) + (1 << 20), "trace")]
    assert found.luo is not None
    assert found.luo.liveupdate_number == 3
    assert [(each.name, each.data, each.count) for each in found.luo.flbs] == [("iommu-v1", 0x99, 2)]
    first, second, empty = found.luo.sessions
    assert [session.name for session in found.luo.sessions] == ["memconsole:a", "memconsole:b", "empty"]
    assert not empty.files
    known, opaque = first.files
    assert (opaque.compatible, opaque.token, opaque.data, opaque.memfd) == ("vfio-v1", 2, 0x1234, None)
    assert known.memfd is not None
    assert (known.token, known.memfd.size, known.memfd.seals, known.memfd.folios) == (1, 3 * PAGE + 5, 2, 4)
    assert known.memfd.extents == (FolioRun(0, 0x5000, 4, 3),)
    assert second.files[0].memfd is not None
    assert second.files[0].memfd.extents == (FolioRun(0, 0x1200, 512, 1), FolioRun(512, 0x8000, 512, 1))
    assert found.preserved is not None
    assert found.preserved.runs == (Run(0x1000, 2), Run(0x1200, 512), Run(0x9000, 8))
    assert found.preserved.orders == {0: 2, 3: 1, 9: 1}
    assert msgspec.json.decode(msgspec.json.encode(found), type=Handover) == found


@given(st.sets(BLOCK, max_size=60))
def test_the_tree_holds_exactly_its_blocks(blocks: set[tuple[int, int]]) -> None:
    memory = Cells()
    found = radix.walk(memory, image.radix(memory, blocks))
    want = {pfn + n for pfn, order in blocks for n in range(1 << order)}
    have = [pfn + n for pfn, count in found.runs for n in range(count)]
    assert have == sorted(want)
    assert all(end.pfn > begin.pfn + begin.count for begin, end in zip(found.runs, found.runs[1:], strict=False))
    assert found.pages == len(want)
    assert sum(found.orders.values()) == len(blocks)


@given(st.binary(min_size=8, max_size=64))
def test_a_leaf_of_any_bits(bits: bytes) -> None:
    memory = Cells()
    tree = image.radix(memory, [(0, 0)])
    leaf = sorted(memory.pages)[1]
    memory.write(leaf, bits)
    want = [bit for bit in range(len(bits) * 8) if bits[bit // 8] >> bit % 8 & 1]
    assert [pfn + n for pfn, count in radix.walk(memory, tree).runs for n in range(count)] == want


def test_a_million_pages_in_one_run_cost_one_run() -> None:
    memory = Cells()
    tree = image.radix(memory, [(n << 18, 18) for n in range(1, 5)])
    assert radix.walk(memory, tree).runs == (Run(1 << 18, 4 << 18),)


# --- trees


def test_dtc_reads_what_we_write_and_we_read_what_dtc_writes(tmp_path: Path) -> None:
    if shutil.which("dtc") is None:
        pytest.skip("no dtc (Debian: device-tree-compiler)")
    source = """/dts-v1/;
    / { compatible = "some", "other"; empty; a = <1 2 3>; child { b = [00 ff 10]; deep { c = "x"; }; }; other { }; };"""
    blob = subprocess.run(["dtc", "-O", "dtb"], input=source.encode(), capture_output=True, check=True).stdout
    found = fdt.parse(blob)
    assert found.texts("compatible") == ("some", "other")
    assert found.properties["a"] == bytes([0, 0, 0, 1, 0, 0, 0, 2, 0, 0, 0, 3])
    assert found.properties["empty"] == b""
    assert list(found.children) == ["child", "other"]
    assert found.children["child"].properties["b"] == b"\x00\xff\x10"
    assert found.children["child"].children["deep"].texts("c") == ("x",)
    _, ours = whole()
    text = subprocess.run(
        ["dtc", "-qI", "dtb", "-O", "dts"], input=ours, capture_output=True, check=True
    ).stdout.decode()
    assert 'compatible = "kho-v4"' in text
    assert [line.split()[0] for line in text.splitlines() if line.endswith("{")][1:] == list(fdt.parse(ours).children)


def test_a_tree_cut_in_its_known_strings_is_whole() -> None:
    memory, blob = whole()
    for end in range(len(blob) - len(STRINGS), len(blob)):
        assert not decode(blob[:end], memory).gaps
    with pytest.raises(BadFile, match="truncated"):
        decode(blob[: len(blob) - len(STRINGS) - 1], memory)
    foreign = image.fdt({"compatible": b"x\0", "another-name": b""}, {}, strings=b"")
    with pytest.raises(BadFile, match="truncated"):
        fdt.parse(foreign[:-3], STRINGS)


def test_another_abi_is_opaque() -> None:
    memory = Cells()
    blobs = {"LUO": image.luo(memory, {}, compatible=b"luo-v6")}
    found = decode(image.root(memory, image.radix(memory, []), blobs), memory)
    assert found.luo is None
    assert found.blobs[0].kind == "luo-v6"
    assert not found.gaps
    other = decode(image.root(memory, 0, {}, "kho-v9"), memory)
    assert (other.compatible, other.preserved, other.blobs) == ("kho-v9", None, ())


def test_a_root_that_offers_several_versions_is_read_by_the_one_that_is_known() -> None:
    memory = Cells()
    tree = image.radix(memory, [(0, 5)])
    found = decode(image.root(memory, tree, {}, "kho-v5;radix-v2\0kho-v4"), memory)
    assert found.compatible == "kho-v4"
    assert found.preserved is not None
    other = decode(image.root(memory, tree, {}, "kho-v5;radix-v2\0kho-v6"), memory)
    assert (other.compatible, other.preserved) == ("kho-v5;radix-v2, kho-v6", None)


@pytest.mark.parametrize("kind", ["kho-v5;radix-v2", "kho-v3-radix-v1", "kho_v7", "kho-v9+flags"])
def test_a_dump_of_a_version_that_is_not_known_has_a_handover_all_the_same(tmp_path: Path, kind: str) -> None:
    memory = Cells()
    memory.put(image.root(memory, image.radix(memory, [(1, 0)]), {}, kind))
    memory.core(tmp_path / "dump")
    (found,) = describe(str(tmp_path / "dump"))
    assert (found.compatible, found.preserved) == (kind, None)


@pytest.mark.parametrize("name", ["kvm_vm_luo_v1", "luo-v5;block-v1", "luo-v3-block-v1", "guest_memfd_luo_v1"])
def test_a_blob_is_known_by_a_word_of_any_form(name: str) -> None:
    assert records.compatible(name.encode() + bytes(32)) == name
    assert records.luo(Cells(), name.encode().ljust(64, b"\0")) is None


def test_a_freed_page_is_no_luo_state() -> None:
    assert records.luo(Cells(), bytes(32)) is None
    assert records.compatible(bytes(32)) == "opaque"
    assert records.compatible(b"\x97\x00|\x01D") == "opaque"


# --- torn structures


def torn(memory: Cells, blob: bytes) -> str:
    """The only gap of a handover, as text."""
    (gap,) = decode(blob, memory).gaps
    return f"{gap.source}: {gap.why}"


def with_luo(memory: Cells, data: bytes) -> bytes:
    return image.root(memory, image.radix(memory, []), {"LUO": data})


def test_a_chain_that_ends_where_it_began() -> None:
    memory = Cells()
    block = memory.put()
    memory.write(block, struct.pack("<QQ", block, 1) + struct.pack("<64sQQ", b"round", 0, 0))
    assert "a second time" in torn(memory, with_luo(memory, struct.pack("<8sQQQ", b"luo-v5", 0, block, 0)))


def test_a_tree_that_bites_its_tail() -> None:
    memory = Cells()
    tree = image.radix(memory, [(5, 0)])
    memory.write(tree + 8, u64(tree))
    with pytest.raises(BadFile, match="corrupt") as error:
        radix.walk(memory, tree)
    assert "a second time" in error.value.why


@pytest.mark.parametrize("address", [0x123, 1 << 62, (1 << 64) - PAGE, 0xDEAD000])
def test_wild_addresses(address: int) -> None:
    memory = Cells()
    with pytest.raises(BadFile, match="the tree of preserved pages is corrupt"):
        radix.walk(memory, address)
    found = torn(memory, with_luo(memory, struct.pack("<8sQQQ", b"luo-v5", 0, address, 0)))
    assert found.startswith("LUO: LUO's list of sessions is corrupt")
    assert f"{address:#x}" in found


def test_impossible_counts() -> None:
    memory = Cells()
    many = memory.put(struct.pack("<QQ", 0, 1 << 40))
    assert "1099511627776 entries" in torn(memory, with_luo(memory, struct.pack("<8sQQQ", b"luo-v5", 0, many, 0)))
    session = image.chain(memory, [struct.pack("<64sQQ", b"short", 0, 3)])
    assert "0 files, but it should have 3" in torn(
        memory, with_luo(memory, struct.pack("<8sQQQ", b"luo-v5", 0, session, 0))
    )


@pytest.mark.parametrize(
    ("size", "folios", "why"),
    [
        (PAGE, [(0, 5, 0), (1, 6, 0)], "2 folios in a file of 4096 bytes"),
        (3 * PAGE, [(1, 5, 0)], "index 1"),
        (3 * PAGE, [(0, 5, 0), (2, 6, 0), (1, 7, 0)], "index 1, after 2"),
        (2 * PAGE, [(0, 5, 0), (9, 6, 0)], "index 9, the file 2 pages"),
        (1 << 60, [(0, 5, 0)], "in a file of"),
    ],
)
def test_impossible_memfds(size: int, folios: list[tuple[int, int, int]], why: str) -> None:
    memory = Cells()
    files = {"s": [("memfd-v2", 1, image.memfd(memory, size, folios))]}
    assert why in torn(memory, with_luo(memory, image.luo(memory, files)))


def test_a_list_of_folios_that_is_too_short() -> None:
    memory = Cells()
    state = image.memfd(memory, 600 * PAGE, [(n, n, 0) for n in range(600)])
    chunk = int.from_bytes(memory.pages[state][32:40], "little")
    memory.write(chunk + 16, u64(0))
    blob = with_luo(memory, image.luo(memory, {"s": [("memfd-v2", 1, state)]}))
    assert "2 of its 3 pages are missing" in torn(memory, blob)


@given(order=st.integers(0, 3), count=st.integers(1, 1500))
@settings(max_examples=20)
def test_lists_of_any_length(order: int, count: int) -> None:
    memory = Cells()
    folios = [(n, 10_000 + 2 * n, n & 3) for n in range(count)]
    files = {f"s{n}": [("memfd-v2", n, image.memfd(memory, count * PAGE, folios, order=order))] for n in range(60)}
    found = records.luo(memory, image.luo(memory, files))
    assert found is not None
    assert len(found.sessions) == 60
    assert found.sessions[59].files[0].memfd is not None
    assert found.sessions[59].files[0].memfd.extents == tuple(FolioRun(n, pfn, 1, flags) for n, pfn, flags in folios)


@given(st.randoms(use_true_random=False))
@settings(max_examples=150, suppress_health_check=[HealthCheck.too_slow])
def test_torn_memory_is_named_and_costs_no_more_than_whole(chance: random.Random) -> None:
    memory, blob = whole()
    honest = sum(len(page) for page in memory.pages.values()) // PAGE
    addresses = sorted(memory.pages)
    for _ in range(chance.randrange(1, 6)):
        address = chance.choice(addresses)
        page = memory.pages.get(address)
        if page is None:
            continue
        kind = chance.randrange(4)
        if kind == 0:
            del memory.pages[address]
        elif kind == 1:
            page[:] = chance.randbytes(PAGE)
        elif kind == 2:
            at = chance.randrange(0, PAGE, 8)
            page[at : at + 8] = u64(chance.choice([*addresses, 0, 1, chance.getrandbits(64)]))
        else:
            at = chance.randrange(0, 128)
            page[at] ^= 1 << chance.randrange(8)
    found = decode(blob, memory, "out")
    msgspec.json.encode(found)
    assert memory.reads <= 4 * honest + 20


@given(st.data())
def test_torn_trees_are_named(data: st.DataObject) -> None:
    memory, blob = whole()
    raw = bytearray(blob)
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    end = data.draw(st.integers(0, len(raw)))
    with suppress(BadFile):
        msgspec.json.encode(decode(bytes(raw[:end]), memory))


@given(st.binary(max_size=300))
def test_any_bytes(raw: bytes) -> None:
    with suppress(BadFile):
        fdt.parse(raw, STRINGS)
    with suppress(BadFile):
        fdt.parse(fdt.MAGIC + raw, STRINGS)
    with suppress(BadFile):
        records.luo(Cells(), raw)
    with suppress(BadFile):
        records.luo(Cells(), b"luo-v5\0\0" + raw)


# --- files


def test_a_dump_is_described(tmp_path: Path) -> None:
    memory, blob = whole()
    address = memory.put(blob)
    memory.put(fdt.MAGIC + b"what is left of another tree")
    memory.core(tmp_path / "dump")
    (found,) = describe(str(tmp_path / "dump"))
    assert found == msgspec.structs.replace(decode(blob, memory), side=f"{address:#x}")
    assert not found.gaps


def test_the_command_line_says_what_a_dump_holds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    memory, blob = whole()
    address = memory.put(blob)
    memory.core(tmp_path / "dump")
    assert main(["inspect", "--json", str(tmp_path / "dump")]) == ExitCode.DONE
    found = msgspec.json.decode(capsys.readouterr().out)
    assert (found["kind"], found["version"]) == ("handover", 4)
    (handover,) = found["facts"]["handovers"]
    assert (handover["root"], handover["preserved_pages"], handover["from"]) == (f"{address:#x}", 522, "7.3.4-lab")
    files = {(row["session"], row["token"]): row["folios"] for row in found["facts"]["files"]}
    assert files == {("memconsole:a", 1): 4, ("memconsole:a", 2): None, ("memconsole:b", 7): 2}
    (tmp_path / "fdt").write_bytes(blob)
    assert main(["inspect", str(tmp_path / "fdt")]) == ExitCode.FINDINGS
    assert "handover-torn" in capsys.readouterr().out


def test_a_tree_alone_is_described(tmp_path: Path) -> None:
    (tmp_path / "fdt").write_bytes(whole()[1])
    (found,) = describe(str(tmp_path / "fdt"))
    assert [each.name for each in found.blobs] == ["LUO", "kexec-metadata", "memblock", "unheard-of"]
    assert [gap.source for gap in found.gaps] == [
        "the tree of preserved pages",
        "LUO",
        "kexec-metadata",
        "memblock",
        "unheard-of",
    ]
    assert found.preserved is None


@pytest.mark.parametrize("size", [0, 3, 63, 64, 100, 4096, 5000])
def test_truncated_dumps_are_named(tmp_path: Path, size: int) -> None:
    memory, blob = whole()
    memory.put(blob)
    memory.core(tmp_path / "whole")
    (tmp_path / "cut").write_bytes((tmp_path / "whole").read_bytes()[:size])
    with pytest.raises(BadFile):
        describe(str(tmp_path / "cut"))


@given(st.data())
@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_torn_headers_of_dumps_are_named(tmp_path: Path, data: st.DataObject) -> None:
    memory = Cells()
    memory.put(image.root(memory, image.radix(memory, [(1, 0)]), {}))
    memory.core(tmp_path / "dump")
    raw = bytearray((tmp_path / "dump").read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, 64 + 56 * len(memory.pages) - 1))] = data.draw(st.integers(0, 255))
    (tmp_path / "dump").write_bytes(raw)
    with suppress(BadFile):
        describe(str(tmp_path / "dump"))


def test_a_tree_that_is_not_of_kho(tmp_path: Path) -> None:
    for kind, ours in ((b"linux,dummy-virt\0", False), (b"", False), (b"kho-vx\0", False), (b"kho-v99\0", True)):
        (tmp_path / "fdt").write_bytes(image.fdt({"compatible": kind}, {}))
        if ours:
            assert describe(str(tmp_path / "fdt"))[0].compatible == "kho-v99"
        else:
            with pytest.raises(BadFile, match="no root FDT of KHO"):
                describe(str(tmp_path / "fdt"))


def test_what_is_no_dump(tmp_path: Path) -> None:
    with pytest.raises(NotFound):
        describe(str(tmp_path / "nothing"))
    (tmp_path / "text").write_text("hello")
    with pytest.raises(BadFile, match="not an ELF core"):
        describe(str(tmp_path / "text"))
    memory = Cells()
    memory.put(b"nothing here")
    memory.core(tmp_path / "dump")
    with pytest.raises(BadFile, match="no handover"):
        describe(str(tmp_path / "dump"))
