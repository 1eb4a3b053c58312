"""One glossary, in the package and in the documents."""

from __future__ import annotations

from pathlib import Path

from memconsole import glossary

DOCS = Path(__file__).parents[2] / "docs"


def test_the_documents_have_the_package_s_glossary() -> None:
    assert (DOCS / "glossary.md").read_text() == glossary.markdown()


def test_every_word_is_told_once_in_a_sentence_of_its_own() -> None:
    words = [word for term in glossary.TERMS for word in term.word.split(", ")]
    assert len(words) == len(set(words))
    assert all(term.meaning and not term.meaning.endswith(".") for term in glossary.TERMS)


def test_what_a_newcomer_does_not_know_is_in_it() -> None:
    words = {word for term in glossary.TERMS for word in term.word.split(", ")}
    assert {"region", "grant", "custody", "rung", "quarantined", "canary", "window", "handoff", "blackout"} <= words
