"""Fields that no request may have: they would reach more than the requested model, or evade the gateway's limits."""

from typing import Any

from gateway.core import strict_json
from gateway.core.errors import BadRequest

# They reach another model or adapter, another host, another caller's slot, request or place in the queue, an operator's corpus,
# or change the backend's code. (`session_id` only marks requests that belong together; no server mixes their texts.)
REFUSED_FIELDS = frozenset(
    "draft_model models fallbacks lora lora_id lora_request lora_path lora_paths adapter adapter_id adapter_source "
    "kv_transfer_params ec_transfer_params kv_router_hint bootstrap_host bootstrap_port bootstrap_room bootstrap_pair_key "
    "http_worker_ipc encoder_urls api_base base_url slot id_slot slot_id session_params rid request_id dp_rank routed_dp_rank "
    "disagg_prefill_dp_rank prefill_dp_rank decode_dp_rank data_parallel_rank ngram_corpus_id logits_processors "
    "custom_logit_processor prompt_embeds input_embeds embed_overrides".split()
)
# Objects whose fields some servers read as the request's own.
EXTRAS = frozenset({"extra_body", "extra_args", "vllm_xargs", "sampling_params", "custom_params"})
# Servers may serve requests with a priority other than 0 before those of other callers.
PRIORITY = "priority"
# Fields that the gateway reads, bounds or counts in the request itself.
OWN_FIELDS = frozenset(
    "model messages prompt input input_ids stream stream_options stream_interval max_tokens max_completion_tokens "
    "max_new_tokens max_output_tokens max_length n_predict num_predict min_tokens min_new_tokens min_length ignore_eos "
    "n n_cmpl best_of num_return_sequences num_beams beam_width use_beam_search".split()
)
CHECKED_FIELDS = REFUSED_FIELDS | EXTRAS | {PRIORITY}
CHECKED_IN_EXTRAS = CHECKED_FIELDS | OWN_FIELDS
UNSET: tuple[object, ...] = (None, -1, "", [], {})


def refuse_fields(body: dict[str, Any]) -> None:
    """Raises BadRequest on such a field, also in extras within extras."""
    _refuse_in(body)
    inner = [(name, body[name]) for name in body.keys() & EXTRAS]
    while inner:
        name, extra = inner.pop()
        if not isinstance(extra, dict):
            if extra not in UNSET:
                raise BadRequest(f"the field {name!r} must be an object")
            continue
        strict_json.refuse_case_variants(extra, CHECKED_IN_EXTRAS)
        _refuse_in(extra)
        for own in extra.keys() & OWN_FIELDS:
            if extra[own] is not None:
                raise BadRequest(f"the field {own!r} is not allowed inside {name!r}; put it at the top level of the request")
        inner += [(deeper, extra[deeper]) for deeper in extra.keys() & EXTRAS]


def take_fields_out(body: dict[str, Any]) -> list[str]:
    """Takes such fields and all extras out of a body; returns the names of those that were set."""
    found = [name for name in body if name in CHECKED_FIELDS]
    return [name for name in found if body.pop(name) not in (*UNSET, 0)]


def _refuse_in(value: dict[str, Any]) -> None:
    for name in value.keys() & REFUSED_FIELDS:
        if value[name] not in UNSET:
            raise BadRequest(f"the field {name!r} is not allowed")
    if value.get(PRIORITY) not in (None, 0):
        raise BadRequest(f"the field {PRIORITY!r} must be 0")
