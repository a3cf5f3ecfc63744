"""What tests with one backend share: each server that it can be, and a gateway in front of the test's `alpha`."""

from collections.abc import Iterator

import pytest

from tests.conftest import StartGateway, TestStores
from tests.support.fake_backend.backend import FakeBackend
from tests.support.gateway_settings import settings_for
from tests.support.model_servers import SERVERS, ModelServer
from tests.support.running_gateway import RunningGateway
from tests.support.shared_gateway import Shared


@pytest.fixture(scope="module", params=SERVERS, ids=str)
def server(request: pytest.FixtureRequest) -> ModelServer:
    found: ModelServer = request.param
    return found


@pytest.fixture(scope="module")
def started(server: ModelServer, shared_stores: TestStores) -> Iterator[Shared]:
    with shared_stores.client() as client:
        client.flushall()
    urls = {"DATABASE_URL": shared_stores.database_url, "REDIS_URL": shared_stores.redis_url}
    with server.backend() as backend, RunningGateway(settings_for(backend, **urls)) as gateway:
        yield Shared(backend, gateway)


@pytest.fixture
def shared(started: Shared) -> Shared:
    """A backend of each kind, with a gateway: started once for a module, as good as new for each test."""
    return started.renewed()


@pytest.fixture
def gateway(start_gateway: StartGateway, alpha: FakeBackend) -> RunningGateway:
    return start_gateway(alpha)
