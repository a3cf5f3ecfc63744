"""What a request may not say: what reaches past the model that was asked for, or in an extra past what the gateway bounds."""

from typing import Any

from gateway.core import strict_json
from gateway.core.errors import BadRequest

# To another model or adapter, another host, another caller's slot, request or place in the queue, an operator's corpus, or
# into the backend's code. (A `session_id` says which requests belong together; no server takes one's text for another's.)
REFUSED_FIELDS = frozenset(
    "draft_model models fallbacks lora lora_id lora_request lora_path lora_paths adapter adapter_id adapter_source "
    "kv_transfer_params ec_transfer_params kv_router_hint bootstrap_host bootstrap_port bootstrap_room bootstrap_pair_key "
    "http_worker_ipc encoder_urls api_base base_url slot id_slot slot_id session_params rid request_id dp_rank routed_dp_rank "
    "disagg_prefill_dp_rank prefill_dp_rank decode_dp_rank data_parallel_rank ngram_corpus_id logits_processors "
    "custom_logit_processor prompt_embeds input_embeds embed_overrides".split()
)
# Objects whose fields some servers take for the request's own.
EXTRAS = frozenset({"extra_body", "extra_args", "vllm_xargs", "sampling_params", "custom_params"})
# Some other than 0 is served before those who wait.
PRIORITY = "priority"
# What the gateway reads, bounds or counts where it stands in the request itself.
OWN_FIELDS = frozenset(
    "model messages prompt input input_ids stream stream_options stream_interval max_tokens max_completion_tokens "
    "max_new_tokens max_output_tokens max_length n_predict num_predict min_tokens min_new_tokens min_length ignore_eos "
    "n n_cmpl best_of num_return_sequences num_beams beam_width use_beam_search".split()
)
LOOKED_AT = REFUSED_FIELDS | EXTRAS | {PRIORITY}
LOOKED_AT_IN_EXTRAS = LOOKED_AT | OWN_FIELDS
UNSAID: tuple[object, ...] = (None, -1, "", [], {})


def refuse_beyond(body: dict[str, Any]) -> None:
    """Raises BadRequest. Extras may stand in extras."""
    _refuse_fields(body)
    inner = [(name, body[name]) for name in body.keys() & EXTRAS]
    while inner:
        name, extra = inner.pop()
        if not isinstance(extra, dict):
            if extra not in UNSAID:
                raise BadRequest(f"the field {name!r} must be an object")
            continue
        strict_json.refuse_case_variants(extra, LOOKED_AT_IN_EXTRAS)
        _refuse_fields(extra)
        for own in extra.keys() & OWN_FIELDS:
            if extra[own] is not None:
                raise BadRequest(f"the field {own!r} is not taken in {name!r}: it belongs into the request itself")
        inner += [(deeper, extra[deeper]) for deeper in extra.keys() & EXTRAS]


def _refuse_fields(value: dict[str, Any]) -> None:
    for name in value.keys() & REFUSED_FIELDS:
        if value[name] not in UNSAID:
            raise BadRequest(f"the field {name!r} is not taken here")
    if value.get(PRIORITY) not in (None, 0):
        raise BadRequest(f"the field {PRIORITY!r} is not taken here: nobody is served before others")
