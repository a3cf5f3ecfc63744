"""A fault of the drill, and what the checks of faults have in common."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from gateway.ops.drill import fake_backend
from gateway.ops.drill.client import ClientAnswer
from gateway.ops.drill.environment import Environment
from gateway.ops.drill.fake_backend import CHATS, ReceivedCall

OLLAMA, OPENAI = CHATS


class Broken(Exception):
    """A promise did not hold; the message describes how."""


class LeftOut(Exception):
    """A fault cannot be injected here; the message gives the reason."""


@dataclass(frozen=True)
class Fault:
    """`promise` is its number in the list of promises in docs/operations.md, "-" if it has none; `check` raises Broken."""

    name: str
    promise: str
    description: str
    check: Callable[[Environment], Awaitable[None]]


def expect(held: object, otherwise: str) -> None:
    if not held:
        raise Broken(otherwise)


def answered(answer: ClientAnswer, status: int = 200) -> None:
    expect(answer.status == status, f"status {answer.status} instead of {status}")


def as_sent(path: str, received: ReceivedCall) -> bytes:
    return b"".join(fake_backend.frames(received)) if received.streams else fake_backend.whole(received)
