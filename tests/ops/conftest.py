"""An operator of this test's stores."""

from pathlib import Path

import pytest

from tests.conftest import TestStores
from tests.support.operator import Operator


@pytest.fixture
def operator(tmp_path: Path, stores: TestStores) -> Operator:
    return Operator(tmp_path, stores)
