"""`health`, for containers."""

from tests.conftest import StartGateway
from tests.support.fake_backend.backend import FakeBackend
from tests.support.operator import Operator
from tests.support.processes import free_port


def test_health_of_a_gateway_ignores_proxies_in_the_environment(
    operator: Operator, start_gateway: StartGateway, alpha: FakeBackend
) -> None:
    port = start_gateway(alpha).url.rpartition(":")[2]
    for host in ("127.0.0.1", "0.0.0.0", "::"):
        assert operator.gets("health", GATEWAY_BIND_PORT=port, GATEWAY_BIND_HOST=host, http_proxy="http://127.0.0.1:1") == ""


def test_health_without_a_gateway(operator: Operator) -> None:
    assert "no gateway answers at http://127.0.0.1:" in operator.is_refused("health", GATEWAY_BIND_PORT=str(free_port()))
    assert "no gateway answers at http://[::1]:" in operator.is_refused(
        "health", GATEWAY_BIND_PORT="1", GATEWAY_BIND_HOST="::1"
    )
