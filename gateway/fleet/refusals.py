"""Errors that backends report: the text, the fields that clients act on, and whether the request or the backend is at fault."""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from gateway.core.errors import BackendCannot, BackendRefused, PromptTooLong
from gateway.dialects.answers import error_text, try_read
from gateway.fleet.backends.config import BackendConfig
from gateway.fleet.redaction import redact

# The caller's own mistakes: another backend would refuse them, too. 401, 403 and 404 are between us and that backend.
CALLERS_FAULTS = frozenset({400, 405, 409, 411, 413, 414, 415, 416, 422, 431})
NOT_IMPLEMENTED = 501
# Proxies answer with these while a backend is down, with a text of their own.
OF_PROXIES = frozenset({502, 503, 504})
DEEPEST_WRAPPING = 3
NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
LARGEST_COUNT = 2**53

# llama.cpp and LM Studio (exceed_context_size_error), Ollama (embed), vLLM, and what OpenAI calls it.
OVERFLOW = re.compile(
    r"exceed_context_size|context_length_exceeded|exceeds? the (?:\w+ )?context (?:size|length|window)|maximum context length"
    r"|context (?:size|length|window) (?:has been )?exceeded|longer than the context length",
    re.IGNORECASE,
)
# llama.cpp, Ollama, vLLM and LM Studio: a model that takes no images, or none like these.
OF_IMAGES = re.compile(
    r"image inputs? (?:is|are) not supported|does not support (?:an? )?(?:image|vision|multimodal)|not a multimodal model"
    r"|missing data required for image input|messages? cannot contain images|failed to (?:load|decode|process) (?:the )?image",
    re.IGNORECASE,
)
# With 5xx: what a backend, or its model, cannot do however often a client tries. Texts have single blanks and no line ends.
UNABLE = (
    # llama.cpp: a model without its mmproj; routes that a flag opens. Ollama: capabilities of a model.
    r"(?:image|audio|video|vision|file) inputs? (?:is|are) not supported",
    r"does not support (?:an? )?(?:image|audio|video|vision|multimodal|embed|rerank|completion|infill|insert|tool)",
    r"does not support (?:think|chat|generat|logprob|grammar)",
    # Ollama: images for a model that takes text only, or more than one image. Both: images that cannot be decoded.
    r"missing data required for image input|only supports one image|messages? cannot contain images",
    r"failed to (?:load|decode|process|download) (?:the )?(?:image|audio)|decode webp image",
    # llama.cpp: texts to embed beyond its batch; messages that the model's template refuses: jinja now, minja before.
    r"input is too large to process",
    r"roles must alternate|jinja exception|while executing \w{1,40} at line \d{1,9}",
    r"error executing \w{1,40} at position \d{1,9}",
    r"at row \d{1,9}, column \d{1,9}:(?:\s|$)|unable to generate parser for this template",
    # The same from Ollama, and from its own templates in Go.
    r"llama-server template error|no user query found in messages",
    r"^template: \S{0,80}:\d{1,9}: |^undefined (?:template specified|action in template|branch)",
    # Ollama: invalid options, formats and thinking modes.
    r"option \"\w{1,40}\" must be|invalid format: .{0,900}; expected \"json\"",
    r"invalid thinking value|unsupported \S{1,40} reasoning",
)
# Tool calls that the model broke or its bound on output cut short: Ollama; llama.cpp before and with its grammars.
BROKEN = (
    r"error parsing tool call|failed to parse (?:\w{1,20} )?(?:json )?tool call|tool call parsing failed|tool call arguments",
    r"incomplete \w{1,20} tool call|invalid (?:tool|function) call|empty (?:\w{1,20} )?function name|mismatched arg_key",
    r"undeclared \w{1,20} function|failed to parse input at pos|does not match the expected peg-|invalid diff: ",
)
CANNOT, BROKE = (re.compile("|".join(words), re.IGNORECASE) for words in (UNABLE, BROKEN))
# With 5xx from llama.cpp, though the request is wrong, at least for its build.
WRONG = re.compile(
    r"^(?:failed to parse (?:messages|tools|tool_choice)\b|unknown (?:reasoning|chat) format\b|unsupported param: "
    r"|only no echo is supported|cannot (?:specify grammar with tools|use both json_schema and grammar)"
    r"|(?:tools|tool_choice) param requires --jinja|invalid base64 value|failed to tokenize prompt|\"prompt\" "
    r"|invalid url (?:value|format)|url must be base64 encoded)",
    re.IGNORECASE,
)
# Not the backend's 5xx: the AI SDK, LangChain and others retry after any 5xx, whatever x-should-retry says.
WRONG_STATUS = 400
# Whatever else the text says, this is a failure, and another time or another backend may do better.
FAILURE = re.compile(
    r"out[ -]of[ -](?:device )?memory|outofmemory|(?:not enough|insufficient) memory|failed to allocate|allocation failed"
    r"|malloc failed|(?:cuda|hip|rocm|metal|vulkan|sycl|ggml)[ _](?:error|assert)|connection (?:refused|reset)|timed out"
    r"|has terminated|unexpectedly stopped|no longer running|encountered while running the model|panic: |fatal error: ",
    re.IGNORECASE,
)
# What may be logged of a failure's text: known phrases only, because the rest may repeat a prompt.
LOGGED = re.compile(
    r"model requires more (?:\w{3,6} )?memory|cudamalloc failed|unknown model architecture|newer version"
    r"|timed out waiting for (?:the )?(?:llama[ -]?)?(?:runner|server|model|slot)s?(?: to (?:start|load|respond|become ready))?"
    r"|(?:runner|server) process has terminated|exit status \d{1,3}|signal: (?:killed|aborted|segmentation fault)"
    r"|(?:failed|unable|error) (?:to )?load(?:ing)? (?:the )?model|maximum pending requests exceeded|no such file or directory"
    rf"|{FAILURE.pattern}",
    re.IGNORECASE,
)
LONGEST_LOGGED = 200


class ReportedError(NamedTuple):
    """`text` for people; `fields` of an OpenAI error for programs: type, code and numbers of tokens."""

    text: str
    fields: Mapping[str, Any]


def read(value: dict[str, Any]) -> ReportedError:
    """An error in any of the shapes of backends; Ollama and LM Studio put that of their runner, as JSON, into its text."""
    text, fields = error_text(value), _fields(value)
    for _ in range(DEEPEST_WRAPPING):
        start = text.find("{")
        inner = try_read(text[start:].encode()) if start >= 0 else {}
        if not inner.get("error"):
            break
        fields = {**fields, **_fields(inner)}
        if start > 0:
            break
        text = error_text(inner)
    return ReportedError(text, fields)


def _fields(value: dict[str, Any]) -> dict[str, Any]:
    error = value.get("error")
    if not isinstance(error, dict):
        return {}
    names = {name: error[name] for name in ("type", "code") if isinstance(error.get(name), str) and NAME.fullmatch(error[name])}
    numbers = {name: error[name] for name in ("code", "n_prompt_tokens", "n_ctx") if _is_count(error.get(name))}
    return {**names, **numbers}


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= LARGEST_COUNT


def meaning(status: int, reported: ReportedError, backend: BackendConfig) -> BackendRefused | None:
    """The error for the caller; None if the backend has failed and another may answer.

    An error that a retry cannot fix is 400, even if the backend reports a failure of its own; 501 stays 501. A tool call that
    the model got wrong keeps its 5xx: a retry may succeed.

    `status` 200: the error was in the body, which may contain the true status.
    """
    if status == 200:
        code = reported.fields.get("code")
        status = code if isinstance(code, int) and 400 <= code <= 599 else 500
    text = redact(reported.text, backend)
    if OVERFLOW.search(f"{reported.text} {reported.fields.get('type')} {reported.fields.get('code')}"):
        return PromptTooLong(
            text,
            WRONG_STATUS if status >= 500 else status,
            {name: _redacted(value, backend) for name, value in reported.fields.items()},
        )
    refused = _refusal(status, reported.text, text)
    if refused is not None:
        refused.is_of_images = OF_IMAGES.search(reported.text) is not None
    return refused


def _refusal(status: int, reported: str, text: str) -> BackendRefused | None:
    if status in CALLERS_FAULTS:
        return BackendRefused(text, status)
    if status >= 500 and _matches(WRONG, status, reported):
        return BackendCannot(text, WRONG_STATUS)
    if status == NOT_IMPLEMENTED or (status >= 500 and _matches(BROKE, status, reported)):
        return BackendCannot(text, status)
    if status >= 500 and _matches(CANNOT, status, reported):
        return BackendCannot(text, WRONG_STATUS)
    return None


def _matches(pattern: re.Pattern[str], status: int, text: str) -> bool:
    return status not in OF_PROXIES and pattern.search(text) is not None and FAILURE.search(text) is None


def logged_reason(reported: ReportedError) -> str:
    """The known phrases in a failure's text, each once, for the log; never text that may contain a prompt, token or address."""
    found = dict.fromkeys(known.group().strip(" :") for known in LOGGED.finditer(reported.text))
    return ", ".join(found)[:LONGEST_LOGGED]


def _redacted(value: object, backend: BackendConfig) -> object:
    return redact(value, backend) if isinstance(value, str) else value
