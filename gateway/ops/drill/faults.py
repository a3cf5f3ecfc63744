"""The faults of the drill, in order: each breaks something, or asks for too much, and checks that a promise still holds."""

from collections.abc import Mapping

from gateway.ops.drill import access_faults, agent_faults, answer_faults, fleet_faults, limit_faults, outage_faults
from gateway.ops.drill.fault import Fault

FAULTS: tuple[Fault, ...] = (
    Fault("bytes", "A1", "answers arrive byte for byte, streamed and whole", answer_faults.pass_bytes),
    Fault("pieces", "A1", "each piece of a stream arrives as soon as it was sent", answer_faults.pass_pieces),
    Fault("refused", "A2", "a backend refuses connections: the next one answers", answer_faults.refused),
    Fault("frozen", "A2", "a backend never answers: the next one answers", answer_faults.frozen),
    Fault("failing", "A2", "a backend answers 500: the next one answers", answer_faults.failing),
    Fault("garbage", "A2", "a backend's first frame is garbage: the next one answers", answer_faults.garbage),
    Fault("dying", "A3", "a backend dies in mid-stream: the stream ends with an error", answer_faults.dying),
    Fault("native", "A2", "a backend with an agent's API fails: the next one answers, translated", agent_faults.native_fails),
    Fault("cut", "A3", "a backend dies under an agent's stream: it ends with an error", agent_faults.agents_cut),
    Fault("left", "A5", "a caller hangs up: its backend is free within a second", answer_faults.client_gone),
    Fault("dialect", "A7", "a backend refuses: clients get the error in their dialect", answer_faults.refusals_in_dialect),
    Fault("down", "-", "all backends of a model are down: 503, with a time to retry", answer_faults.all_down),
    Fault("key", "W1", "no key, a wrong key: 401", access_faults.wrong_key),
    Fault("revoke", "W1", "a revoked key stops within a second, in every process", access_faults.revoked),
    Fault("unknown", "W3", "an unknown model and a forbidden one get the same answer", access_faults.unknown_is_forbidden),
    Fault("verbs", "W5", "routes that change models are closed to an ordinary key", access_faults.model_routes),
    Fault("secrets", "W6", "keys never reach backends, their tokens never reach callers", access_faults.secrets_stay),
    Fault("requests", "L1", "a burst on two processes: exactly the limit is admitted", limit_faults.requests_burst),
    Fault("slots", "L1", "more at once than allowed: exactly the limit runs", limit_faults.slots_burst),
    Fault("tokens", "L2", "tokens per minute: the limit is enforced", limit_faults.tokens_limit),
    Fault("none", "L3", "a request refused by one limit counts towards no other", limit_faults.all_or_none),
    Fault("orphans", "F4", "calls of a killed process free their slots and the queue", fleet_faults.died_with_its_calls),
    Fault("busy", "F2", "more calls than a backend has slots: they wait, on all processes", fleet_faults.more_than_slots),
    Fault("queue", "F4", "a caller that waits hangs up: the queue forgets it", fleet_faults.waiting_caller_gone),
    Fault("redis", "-", "Redis freezes: known keys still work, and it is used again", outage_faults.redis_frozen),
    Fault("killed", "L4", "a killed process's slots are released", limit_faults.killed),
    Fault("drain", "-", "SIGTERM: calls complete, new work is refused, exit 0", outage_faults.drained),
    Fault("books", "L6", "each request of this drill is in the audit, once, as it was", limit_faults.complete_audit),
)
BY_NAME: Mapping[str, Fault] = {fault.name: fault for fault in FAULTS}
