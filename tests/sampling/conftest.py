"""What the tests of POA share: a small SD1 pipeline, its base, and exports of it, each written once."""

from pathlib import Path
from typing import Any

import pytest

from tests.support.poa_cases import SD15, Case


@pytest.fixture(scope="session")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case("sd15", tmp_path_factory.mktemp("base"))


@pytest.fixture
def baked(case: Case) -> Path:
    return case.baked()


@pytest.fixture
def pipe() -> Any:
    return SD15.make()
