"""OpenAI's Responses API as the dialect of a client. Nothing is kept between calls."""

from gateway.dialects.translation.responses_answer import EventWriter, new_id, write
from gateway.dialects.translation.responses_models import codex_models
from gateway.dialects.translation.responses_request import ResponsesPrompt, count_estimate, read

__all__ = ["EventWriter", "ResponsesPrompt", "codex_models", "count_estimate", "new_id", "read", "write"]
