"""OpenAI's Responses API as the dialect of a client. Nothing is kept between calls."""

from gateway.dialects.translation.responses_answer import EventWriter, new_id, write
from gateway.dialects.translation.responses_models import codex_models
from gateway.dialects.translation.responses_passthrough import passes_unchanged, without_unsupported
from gateway.dialects.translation.responses_request import ResponsesPrompt, count_estimate, read, rough_need

__all__ = [
    "EventWriter",
    "ResponsesPrompt",
    "codex_models",
    "count_estimate",
    "new_id",
    "passes_unchanged",
    "read",
    "rough_need",
    "without_unsupported",
    "write",
]
