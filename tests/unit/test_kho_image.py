"""Kernel images: their ABI strings however they are packed, and whether they fit into scratch."""

from __future__ import annotations

import gzip
import os
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.bzimages import ELF, MIB, PACKERS, bzimage

from memconsole.backend.handoff import image
from memconsole.errors import BadFile, MemconsoleError, NotFound
from memconsole.model import Range


@pytest.mark.parametrize("compression", PACKERS)
def test_every_packing(tmp_path: Path, compression: str) -> None:
    found = inspect(bzimage(tmp_path / "vmlinuz", PACKERS[compression](ELF)))
    assert (found.compression, found.why) == (compression, "")
    assert found.abis == ("kho-v4", "luo-v5", "memfd-v2")
    assert (found.release, found.version) == ("7.3.4-test", "#1")
    assert (found.alignment, found.init_size) == (2 * MIB, 20 * MIB)


def test_a_packing_that_is_not_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert inspect(bzimage(tmp_path / "a", b"\x89LZO" + bytes(99))).why == "lzo is not known here"
    assert inspect(bzimage(tmp_path / "b", b"what?")).abis is None
    monkeypatch.setenv("PATH", str(tmp_path))
    unpacked = inspect(bzimage(tmp_path / "c", b"\x28\xb5\x2f\xfd" + bytes(99)))
    assert (unpacked.compression, unpacked.abis) == ("zstd", None)
    assert "zstd" in unpacked.why


@pytest.mark.parametrize("compression", PACKERS)
def test_a_torn_payload_is_not_known(tmp_path: Path, compression: str) -> None:
    payload = PACKERS[compression](ELF)
    torn = payload[:8] + bytes(byte ^ 0xA5 for byte in payload[8:])
    found = inspect(bzimage(tmp_path / "vmlinuz", torn))
    assert found.abis in {None, ()}
    assert found.abis == () or found.why


def test_what_is_no_image(tmp_path: Path) -> None:
    with pytest.raises(NotFound):
        inspect(str(tmp_path / "none"))
    (tmp_path / "text").write_bytes(b"x" * 10_000)
    with pytest.raises(BadFile, match="no kernel image"):
        inspect(str(tmp_path / "text"))
    whole = Path(bzimage(tmp_path / "whole", PACKERS["gzip"](ELF))).read_bytes()
    (tmp_path / "cut").write_bytes(whole[:-20])
    with pytest.raises(BadFile, match="truncated"):
        inspect(str(tmp_path / "cut"))


@given(st.data())
@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_torn_headers_are_named(tmp_path: Path, data: st.DataObject) -> None:
    raw = bytearray(Path(bzimage(tmp_path / "vmlinuz", PACKERS["gzip"](ELF))).read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.sampled_from([0x1F1, 0x20E, 0x20F, *range(0x248, 0x250), *range(0xA00, 0xA50)]))] = data.draw(
            st.integers(0, 255)
        )
    (tmp_path / "vmlinuz").write_bytes(raw)
    with suppress(BadFile):
        inspect(str(tmp_path / "vmlinuz"))


def inspect(path: str) -> image.KernelImage:
    """As the process that unpacks it does."""
    fd = image.opened(path)
    try:
        return image.inspect(path, fd)
    finally:
        os.close(fd)


def regions(*sizes: int) -> list[Range]:
    return [Range(n << 40, (n << 40) + size, "KHO scratch") for n, size in enumerate(sizes)]


def test_what_fits(tmp_path: Path) -> None:
    found = inspect(bzimage(tmp_path / "vmlinuz", ELF))
    assert image.shortage(found, 10 * MIB, regions(64 * MIB)) == ""
    assert image.shortage(found, 50 * MIB, regions(24 * MIB, 0, 50 * MIB)) == ""
    assert image.shortage(found, 50 * MIB, regions(64 * MIB)).startswith("the initrd needs 50M")
    assert image.shortage(found, 0, regions(10 * MIB)).startswith("the kernel needs")
    assert image.shortage(found, 0, []) == "boot parameters needs 1M, the largest scratch region has 0"


def test_nothing_is_loaded_that_is_no_kernel(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("no kernel")
    was = image.loaded()
    with pytest.raises(MemconsoleError):
        image.load(str(tmp_path / "text"), None, "quiet")
    with pytest.raises(NotFound):
        image.load(str(tmp_path / "text"), str(tmp_path / "none"), "quiet")
    assert image.loaded() == was


def test_what_is_built_in_is_known_by_its_parameters(tmp_path: Path) -> None:
    parts = b"bound to vfio-pci\0vfio_pci.ids\0xiommufd.allow_unsafe_interrupts\0"
    found = inspect(bzimage(tmp_path / "vmlinuz", gzip.compress(ELF + parts)))
    assert found.modules == ("vfio_pci",)
