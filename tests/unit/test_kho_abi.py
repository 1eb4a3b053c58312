"""ABI words of kernels: what is understood is compared, of what is not only that it is the same is ever said."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memconsole.backend.kernel.handover import abi
from memconsole.backend.kernel.handover.abi import Verdict


@pytest.mark.parametrize(
    ("text", "family", "understood"),
    [
        ("kho-v4", "kho", True),
        ("luo-v5;block-v1;session-v2", "luo", True),
        ("memfd_v2", "memfd", True),
        ("luo-v3-block-v1", "luo", False),
        ("kvm_vm_luo_v1", "kvm", False),
        ("guest_memfd_luo_v1", "guest", False),
        ("luo-v5+hugetlb", "luo", False),
        ("luo-v5;", "luo", False),
        ("luo-v5:block", "luo", False),
    ],
)
def test_a_word_is_understood_where_its_parts_are_names_with_one_version(
    text: str, family: str, understood: bool
) -> None:
    word = abi.parse(text)
    assert word is not None
    assert (word.understood, abi.family(text)) == (understood, family)


@pytest.mark.parametrize("text", ["", "kho", "kho-vx", "kho-metadata", "KHO-v4", "v", "-v4", ";luo-v5", "4-v4"])
def test_what_has_no_name_or_no_version_is_no_word(text: str) -> None:
    assert abi.parse(text) is None
    assert abi.family(text) == ""


@pytest.mark.parametrize(
    ("ours", "theirs", "verdict"),
    [
        (["luo-v5"], ["luo-v5"], Verdict.SAME),
        (["luo-v5"], ["luo-v4", "luo-v5", "luo-v6"], Verdict.SAME),
        (["luo-v6", "luo-v5"], ["luo-v5"], Verdict.SAME),
        (["luo-v3-block-v1"], ["luo-v3-block-v1"], Verdict.SAME),
        (["luo-v5;b-v1"], ["luo-v5;b-v1"], Verdict.SAME),
        (["luo-v5"], ["luo-v6"], Verdict.OTHER),
        (["luo-v5"], ["luo-v4", "luo-v6"], Verdict.OTHER),
        (["luo-v5;b-v1"], ["luo-v5;b-v2"], Verdict.OTHER),
        (["luo-v5"], ["luo-v5;b-v1"], Verdict.UNKNOWN),
        (["luo-v5"], ["luo-v3-block-v1"], Verdict.UNKNOWN),
        (["luo-v5"], ["luo-v5+hugetlb"], Verdict.UNKNOWN),
        (["luo-v5"], ["luo-v6", "luo-v3-block-v1"], Verdict.UNKNOWN),
        (["luo-v5"], ["kvm_vm_luo_v1"], Verdict.UNKNOWN),
        (["luo-v5"], ["luo-v6", "kvm_vm_luo_v1"], Verdict.OTHER),
        ([], ["luo-v5"], Verdict.UNKNOWN),
        (["luo-v5"], ["kho-v4", "memfd-v2"], Verdict.NONE),
        (["luo-v5"], [], Verdict.NONE),
    ],
)
def test_what_is_known_of_two_kernels(ours: Sequence[str], theirs: Sequence[str], verdict: Verdict) -> None:
    assert abi.compare("luo", ours, theirs) is verdict


def test_words_are_found_where_a_compiler_puts_them() -> None:
    blob = (
        b"text kho-v4\0luo-v5;block-v1\0\xff\xffmemfd-v2\0xkho-v9\0kho-v77 \0luo-v\0luo-v%d\0\0kvm_vm_luo_v1\0"
        b"xluo-v3\0" + b"luo-v3-block-v1\0" + b"a" * 300 + b"-luo-v8\0kho-v5"
    )
    assert abi.words(blob) == ("kho-v4", "kvm_vm_luo_v1", "luo-v3-block-v1", "luo-v5;block-v1", "memfd-v2")


PIECES = [b"kho", b"luo", b"-", b"_", b"v", b"5", b";", b"\0", b"+", b" ", b"\xff"]


@given(st.lists(st.sampled_from(PIECES), max_size=60))
def test_any_bytes_have_words_that_are_words(parts: list[bytes]) -> None:
    for word in abi.words(b"".join(parts)):
        assert abi.parse(word) is not None
        assert abi.compare(abi.family(word), [word], [word]) is Verdict.SAME
