"""A gateway in front of one backend that several tests share: each finds them as if they had just started."""

from typing import NamedTuple, Self

from tests.support.fake_backend.backend import FakeBackend
from tests.support.running_gateway import RunningGateway


class Shared(NamedTuple):
    backend: FakeBackend
    gateway: RunningGateway

    def renewed(self) -> Self:
        self.backend.renew()
        self.gateway.renew()
        return self
