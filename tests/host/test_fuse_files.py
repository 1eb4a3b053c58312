"""What the tree shows beside RAM: status, state, windows, and where the pages are."""

from __future__ import annotations

import contextlib
import mmap
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.guests import region
from support.memory import need_frames
from support.mounts import NOBODY, Attacker, add_guest, hostile, trees
from support.waiting import until

from memconsole.backend.exports.fuse import FuseTree, MapPart
from memconsole.errors import NotFound, UsageError
from memconsole.extents import ExtentTable, Flag

PAGE = 4096
LINE = 66
LETTERS = "PSFXDWH"


@pytest.fixture
def tree() -> Iterator[FuseTree]:
    with trees() as tree:
        add_guest(tree, "web", NOBODY, NOBODY)
        yield tree


def parse(text: bytes) -> list[tuple[int, int | None, int, int, int]]:
    """Rows of a pfnmap: offset, gpa, pfn, count, flags."""
    lines = [text[at : at + LINE].decode() for at in range(0, len(text), LINE)]
    assert all(len(line) == LINE and line.endswith("\n") for line in lines)
    assert lines[0].split() == ["offset", "gpa", "pfn", "count", LETTERS]
    rows = []
    for line in lines[1:]:
        offset, gpa, pfn, count, flags = line.split()
        bits = sum(1 << at for at, letter in enumerate(LETTERS) if flags[at] == letter)
        assert all(flags[at] in {letter, "-"} for at, letter in enumerate(LETTERS))
        rows.append((int(offset, 16), None if set(gpa) == {"-"} else int(gpa, 16), int(pfn, 16), int(count, 16), bits))
    return rows


@contextlib.contextmanager
def scattered(pages: int) -> Iterator[int]:
    """A memfd with a hole in the middle and neighbours touched one after the other."""
    with region(pages * PAGE) as fd:
        for page in [*range(pages // 3), *range(pages // 2, pages, 2), *range(pages // 2 + 1, pages, 2)]:
            os.pwrite(fd, b"x", page * PAGE)
        yield fd


def test_a_pfnmap_lists_what_the_scan_finds(tree: FuseTree) -> None:
    need_frames()
    with scattered(512) as fd:
        path = tree.set_pfnmap("web", [MapPart(fd, 0, 512 * PAGE, 0x100000000)])
        rows = parse(path.read_bytes())
        with ExtentTable.scan_fd(fd, 512 * PAGE) as table:
            wanted = [
                (row.offset * PAGE, 0x100000000 + row.offset * PAGE, row.pfn, row.count, int(row.flags))
                for row in table.rows(0, len(table))
            ]
        assert rows == wanted
        assert sum(row[3] for row in rows) == 512 // 3 + 256


def test_a_pfnmap_of_parts_clips_runs_at_their_ends(tree: FuseTree) -> None:
    need_frames()
    with scattered(64) as fd, ExtentTable.scan_fd(fd, 64 * PAGE) as table:
        parts = [MapPart(fd, 40 * PAGE, 8 * PAGE, 0), MapPart(fd, 3 * PAGE, 10 * PAGE, None)]
        rows = parse(tree.set_pfnmap("web", parts).read_bytes())
        pages = {}
        for offset, gpa, pfn, count, flags in rows:
            assert flags & Flag.PRESENT
            for page in range(count):
                pages[offset // PAGE + page] = (pfn + page, None if gpa is None else gpa + page * PAGE)
        wanted = {}
        for first, count, gpa in ((40, 8, 0), (3, 10, None)):
            for page in range(first, first + count):
                row = table.lookup(page)
                assert row is not None
                pfn = table[row].pfn + page - table[row].offset
                wanted[page] = (pfn, None if gpa is None else gpa + (page - first) * PAGE)
        assert pages == wanted


def test_a_pfnmap_is_read_anywhere_and_is_true_when_opened(tree: FuseTree) -> None:
    need_frames()
    with scattered(2048) as fd:
        path = tree.set_pfnmap("web", [MapPart(fd, 0, 2048 * PAGE, None)])
        with path.open("rb", buffering=0) as file:
            size = file.seek(0, os.SEEK_END)
            whole = b"".join(os.pread(file.fileno(), 1 << 20, at) for at in range(0, size, 1 << 20))
            assert len(whole) == size == (len(parse(whole)) + 1) * LINE
            for at in [0, 1, LINE - 1, LINE, LINE + 1, size // 2, size - 1, size, size + 1, 1 << 40]:
                for length in (1, 65, 66, 67, 1000):
                    assert os.pread(file.fileno(), length, at) == whole[at : at + length]
            os.ftruncate(fd, 0)
            assert os.pread(file.fileno(), size, 0) == whole, "an open file shows what was true when it was opened"
        assert parse(path.read_bytes()) == []


READ = 1 << 20
"""Bytes the kernel asks for at most in one request (native/fuse.h:READ_MAX)."""


@contextlib.contextmanager
def every_other(pages: int) -> Iterator[int]:
    """A memfd of twice as many pages, of which every other has a frame: no two lie in one run."""
    with region(2 * pages * PAGE) as fd:
        for page in range(pages):
            os.pwrite(fd, b"x", 2 * page * PAGE)
        yield fd


def test_a_pfnmap_larger_than_any_read_is_sought_in_as_any_file(tree: FuseTree) -> None:
    need_frames()
    pages = 36_000
    with every_other(pages) as fd:
        path = tree.set_pfnmap("web", [MapPart(fd, 0, 2 * pages * PAGE, 1 << 32)])
        with path.open("rb", buffering=0) as file:
            whole = file.readall()
            assert len(whole) == (pages + 1) * LINE > 2 * READ
            offsets = range(0, 2 * pages * PAGE, 2 * PAGE)
            assert [row[:2] for row in parse(whole)] == [(at, (1 << 32) + at) for at in offsets]
            rng = random.Random(4)
            places = [0, 1, READ - 1, READ, READ + 1, 2 * READ - LINE, len(whole) - 1, len(whole), len(whole) + READ]
            for at in [*places, *(rng.randrange(len(whole)) for _ in range(60))]:
                for length in (1, LINE, rng.randrange(1, 5000), READ + 1, 3 * READ):
                    assert os.pread(file.fileno(), length, at) == whole[at : at + length]
            for _ in range(60):
                at, step = rng.randrange(len(whole)), rng.randrange(100)
                assert file.seek(at) == at
                assert file.read(10) == whole[at : at + 10]
                back = file.seek(-step, os.SEEK_CUR) if at + 10 >= step else file.seek(0)
                assert file.read(200) == whole[back : back + 200]
            assert file.seek(-LINE, os.SEEK_END) == len(whole) - LINE
            assert file.read() == whole[-LINE:]
            with pytest.raises(OSError, match="Invalid argument"):
                file.seek(-1)
        with path.open("rb") as lines:
            lines.seek(30_000 * LINE)
            assert lines.readline() == whole[30_000 * LINE :][:LINE]
            assert sum(1 for _ in lines) == pages - 30_000
        tail = subprocess.run(["tail", "-n", "2", path], capture_output=True, check=True).stdout
        assert tail == whole[-2 * LINE :]
        skipped = subprocess.run(["dd", f"if={path}", "bs=7000", "skip=300"], capture_output=True, check=True).stdout
        assert skipped == whole[7000 * 300 :]


def test_a_pfnmap_that_is_open_stays_as_it_was_while_the_memory_changes(tree: FuseTree) -> None:
    need_frames()
    pages = 18_000
    with every_other(pages) as fd:
        path = tree.set_pfnmap("web", [MapPart(fd, 0, 2 * pages * PAGE, None)])
        with path.open("rb", buffering=0) as first, path.open("rb", buffering=0) as untouched:
            before = os.pread(first.fileno(), READ, 0)
            with mmap.mmap(fd, 2000 * PAGE) as memory:
                memory.madvise(mmap.MADV_REMOVE)  # rows vanish before what is read next
            os.pwrite(fd, b"y", PAGE * (2 * pages - 1))
            with path.open("rb", buffering=0) as second:
                os.ftruncate(fd, pages * PAGE)
                old = before + os.pread(first.fileno(), 10 * READ, len(before))
                new = second.read()
            assert len(parse(old)) == pages
            assert old == untouched.read(), "the same from its begin, however much later it is read"
            assert sum(row[3] for row in parse(new)) == pages - 1000 + 1
        last = parse(path.read_bytes())
        assert len(last) == pages // 2 - 1000
        assert {row[0] for row in last} < {row[0] for row in parse(old)}


def test_a_pfnmap_has_the_size_of_its_text_for_who_asks_before_opening_it(tree: FuseTree, tmp_path: Path) -> None:
    need_frames()
    with every_other(2000) as fd:
        path = tree.set_pfnmap("web", [MapPart(fd, 0, 4000 * PAGE, None)])
        assert path.stat().st_size == 2001 * LINE, "nobody has opened it yet"
        wanted = path.read_bytes()
        archive = subprocess.run(["tar", "-cf", "-", "-C", path.parent, path.name], capture_output=True, check=True)
        assert archive.stderr == b""
        unpacked = subprocess.run(["tar", "-xOf", "-"], input=archive.stdout, capture_output=True, check=True)
        assert unpacked.stdout == wanted
        copy = tmp_path / "copy"
        subprocess.run(["cp", path, copy], check=True)
        assert copy.read_bytes() == wanted
        counted = subprocess.run(["wc", "-c", path], capture_output=True, check=True).stdout
        assert int(counted.split()[0]) == len(wanted)
        os.ftruncate(fd, 0)
        until(lambda: path.stat().st_size == LINE, "a size that was told is not told for long")
        assert parse(path.read_bytes()) == []
    with region(2 * PAGE) as other:
        os.pwrite(other, b"x", 0)
        tree.set_pfnmap("web", [MapPart(other, 0, 2 * PAGE, None)])
        assert path.stat().st_size == 2 * LINE, "the size of what it lists now"
        tree.revoke("guests/web/pfnmap")
        assert path.stat().st_mode & 0o777 == 0


def test_many_ask_for_the_size_of_a_pfnmap_at_once_and_all_are_told(tree: FuseTree) -> None:
    need_frames()
    with every_other(4096) as fd:
        for _ in range(5):
            path = tree.set_pfnmap("web", [MapPart(fd, 0, 8192 * PAGE, None)])
            asked = [subprocess.Popen(["stat", "-c", "%s", path], stdout=subprocess.PIPE) for _ in range(8)]
            assert {int(each.communicate()[0]) for each in asked} == {4097 * LINE}


def test_only_so_many_scans_of_a_guest_are_held_and_root_may_have_more(tree: FuseTree) -> None:
    with region(64 * PAGE) as fd, contextlib.ExitStack() as stack:
        path = tree.set_pfnmap("web", [MapPart(fd, 0, 64 * PAGE, None)], NOBODY, NOBODY)
        for opened, said in ((8, ""), (9, "Too many open files")):  # paste opens all of its files before it reads any
            pasted = subprocess.run(
                ["paste", *[path] * opened], user=NOBODY, group=NOBODY, capture_output=True, text=True, check=False
            )
            assert (pasted.returncode != 0, said in pasted.stderr) == (bool(said), True), pasted.stderr
        until(lambda: tree.status().handles == 0, "the files of paste are closed")
        for _ in range(16):
            stack.enter_context(path.open("rb"))
        with pytest.raises(OSError, match="Too many open files"), path.open("rb"):
            pass
        stack.close()
        until(lambda: tree.status().handles == 0, "the files are closed")
        assert parse(path.read_bytes()) == []


def test_many_readers_at_once_all_get_a_map(tree: FuseTree) -> None:
    need_frames()
    with scattered(4096) as fd:
        path = tree.set_pfnmap("web", [MapPart(fd, 0, 4096 * PAGE, None)])
        wanted = path.read_bytes()
        readers = [subprocess.Popen(["cat", path], stdout=subprocess.PIPE) for _ in range(6)]
        assert [reader.communicate()[0] for reader in readers] == [wanted] * 6


def test_a_status_is_replaced_at_once(tree: FuseTree) -> None:
    path = tree.set_status("web", b'{"state": "running"}\n', NOBODY, NOBODY)
    with path.open("rb", buffering=0) as before:
        longer = b'{"state": "paused", "since": 1}\n' * 5000
        assert tree.set_status("web", longer, NOBODY, NOBODY) == path
        assert before.read() == b'{"state": "running"}\n', "who has it open reads on what he opened"
    assert path.read_bytes() == longer
    assert path.stat().st_size == len(longer)
    with pytest.raises(PermissionError), path.open("r+b"):
        pass


def test_a_revoked_text_is_neither_opened_nor_read_on(tree: FuseTree) -> None:
    path = tree.set_status("web", b"secret" * 1000)
    fd = os.open(path, os.O_RDONLY)
    assert os.read(fd, 6) == b"secret"
    tree.revoke("guests/web/status")
    for use in (lambda: os.read(fd, 6), lambda: os.close(fd)):
        with pytest.raises(OSError, match="Input/output error"):
            use()
    with pytest.raises(PermissionError), path.open("rb"):
        pass


def test_state_and_windows(tree: FuseTree, tmp_path: Path) -> None:
    with region(PAGE) as fd:
        os.pwrite(fd, b"vcpu", 0)
        path = tree.set_state("web", "vcpu0", fd)
        assert path.read_bytes()[:5] == b"vcpu\0"
    (tmp_path / "resource0").write_text("bar")
    link = tree.link_window("web", "0000:00:04.0", 0, tmp_path / "resource0")
    assert link.name == "0000:00:04.0-bar0"
    assert link.read_text() == "bar"


def test_a_directory_of_many_lists_each_once(tree: FuseTree) -> None:
    names = [f"vm-{number}" for number in range(700)]
    for name in names:
        tree.directory(f"guests/{name}")
    listed = [path.name for path in (tree.mountpoint / "guests").iterdir()]
    assert sorted(listed) == sorted([*names, "web"])
    assert [entry.path for entry in tree.list() if entry.path.startswith("guests/vm-")] == [
        f"guests/{name}" for name in sorted(names)
    ]
    with os.scandir(tree.mountpoint / "guests") as scan:
        seen = []
        for entry in scan:
            seen.append(entry.name)
            if len(seen) == 100:
                for name in names[50::2]:
                    tree.remove(f"guests/{name}")
    assert len(seen) == len(set(seen))
    assert set(names[1:50:2]) <= set(seen)


def test_nobody_but_its_owner_looks_into_a_guest(tree: FuseTree) -> None:
    path = tree.set_status("web", b"{}", NOBODY, NOBODY)
    directory = tree.path.parent
    with Attacker(hostile(directory), path, NOBODY) as owner, Attacker(directory / "hostile", path, 1000) as other:
        assert owner.do("open-ro") == "ok"
        assert owner.do("read") == "ok {}"
        assert other.do("open-ro") == "EACCES"


def test_bad_parts_are_refused(tree: FuseTree) -> None:
    with region(PAGE) as fd:
        for parts in ([], [MapPart(fd, 0, PAGE, None)] * 65):
            with pytest.raises(UsageError):
                tree.set_pfnmap("web", parts)
        for part in (MapPart(fd, 1, PAGE, None), MapPart(fd, 0, 0, None), MapPart(fd, 0, PAGE, 5)):
            with pytest.raises(Exception, match="lengths in the request do not add up"):
                tree.set_pfnmap("web", [part])
    with pytest.raises(NotFound):
        tree.set_status("none", b"")


def test_standard_tools_walk_the_tree(tree: FuseTree) -> None:
    tree.set_status("web", b"{}\n")
    found = subprocess.run(["find", tree.mountpoint, "-ls"], capture_output=True, text=True, check=True).stdout
    assert "guests/web/status" in found
    assert (
        subprocess.run(["cat", tree.mountpoint / "guests/web/status"], capture_output=True, check=True).stdout
        == b"{}\n"
    )
    assert subprocess.run(["df", tree.mountpoint], capture_output=True, check=True).returncode == 0
    code = f"import os; print(len(os.listdir({str(tree.mountpoint)!r})))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout == b"1\n"
