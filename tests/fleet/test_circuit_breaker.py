"""The circuit breaker opens after failures, lets one probe through, and closes again."""

from gateway.fleet.backends.circuit_breaker import FAILURES_UNTIL_OPEN, FIRST_PAUSE_S, LONGEST_PAUSE_S, CircuitBreaker


def test_it_opens_after_failures_and_closes_after_a_probe() -> None:
    now = [0.0]
    breaker = CircuitBreaker(lambda: now[0])
    for _ in range(FAILURES_UNTIL_OPEN):
        assert breaker.lets_pass
        breaker.attempt()
        breaker.failed()
    assert breaker.state == "open" and not breaker.lets_pass
    now[0] += FIRST_PAUSE_S
    assert breaker.state == "half-open" and breaker.lets_pass
    breaker.attempt()
    assert not breaker.lets_pass, "one probe at a time"
    breaker.abandoned()
    assert breaker.lets_pass, "a probe whose client left says nothing"
    breaker.attempt()
    breaker.failed()
    assert breaker.state == "open"
    now[0] += FIRST_PAUSE_S
    assert breaker.state == "open", "the pause has grown"
    now[0] += LONGEST_PAUSE_S
    breaker.attempt()
    breaker.succeeded()
    assert breaker.state == "closed" and breaker.lets_pass
