"""What tests with one backend share: each server that it can be, and a gateway in front of the test's `alpha`."""

import pytest

from tests.conftest import StartGateway
from tests.support.fake_backend.backend import FakeBackend
from tests.support.model_servers import SERVERS, ModelServer
from tests.support.running_gateway import RunningGateway


@pytest.fixture(params=SERVERS, ids=str)
def server(request: pytest.FixtureRequest) -> ModelServer:
    found: ModelServer = request.param
    return found


@pytest.fixture
def gateway(start_gateway: StartGateway, alpha: FakeBackend) -> RunningGateway:
    return start_gateway(alpha)
