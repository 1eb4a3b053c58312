"""memconsole-resume beside a keeper, both under ASan and UBSan, for the tests of either side of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from support import keepers, resume_stage
from support.resume_stage import Stage


@pytest.fixture(scope="module")
def resume_program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return resume_stage.built(tmp_path_factory.mktemp("resume"))


@pytest.fixture(scope="module")
def keeper_program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return keepers.build_sanitized(tmp_path_factory.mktemp("keeper"))


@pytest.fixture
def stage(resume_program: Path, keeper_program: Path, tmp_path: Path) -> Iterator[Stage]:
    with keepers.running(keeper_program) as keeper, Stage(resume_program, keeper, tmp_path) as made:
        yield made
