"""What tests of pushes and plan files share: a desk with a Hub of its own, and baked files to push."""

from pathlib import Path

import pytest

from tests.support.forks import Forks
from tests.support.loopback_hub import LoopbackHub
from tests.support.publishing import Desk, Made


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return Made.below(tmp_path_factory.mktemp("made"))


@pytest.fixture
def desk(loopback_hub: LoopbackHub, tmp_path: Path, clients: Forks | None) -> Desk:
    return Desk(loopback_hub, tmp_path, clients)
