"""Rerankers, images, speech and transcriptions in the OpenAI API: routes that some backends have."""

from typing import Any

from gateway.core.errors import BadRequest
from gateway.dialects import tokens
from gateway.dialects.dialect import Kind, Operation
from gateway.dialects.fields import expect
from gateway.dialects.tokens import Need

KINDS: frozenset[Kind] = frozenset({"ollama", "openai"})
FIELDS = frozenset("query documents texts top_n size quality voice speed stream_format partial_images file language".split())
MOST_IMAGES = 10
OF_RERANK = tokens.SETTINGS | {"query", "documents", "texts", "top_n"}
OF_IMAGES = tokens.SETTINGS | {"prompt", "size", "quality", "response_format", "output_format", "background", "style"}
OF_SPEECH = tokens.SETTINGS | {"input", "voice", "speed", "response_format", "stream_format", "language", "task_type"}
AUDIO = ("audio/", "application/octet-stream")
# The last events of streams that have no [DONE].
LAST_EVENTS = frozenset({"image_generation.completed", "speech.audio.done", "transcript.text.done"})
TRANSCRIPTS = ("application/json", "text/plain", "text/vtt", "text/srt", "application/x-subrip")


def _documents(body: dict[str, Any]) -> Any:
    """Under the name of Jina's and Cohere's API, or under that of Text Embeddings Inference."""
    return body.get("documents") if body.get("documents") is not None else body.get("texts")


def _check_rerank(body: dict[str, Any]) -> None:
    if body.get("query") is None:
        raise BadRequest("the field 'query' is missing")
    expect(body, "query", (str, dict), "a string or an object")
    if _documents(body) is None:
        raise BadRequest("the field 'documents' is missing")
    for name in ("documents", "texts"):
        expect(body, name, (list, dict), "a list")
    expect(body, "top_n", int, "an integer")


def _need_of_rerank(body: dict[str, Any]) -> Need:
    """The model reads the query with each document."""
    documents = _documents(body)
    pairs = len(documents) if isinstance(documents, list) else 1
    query = tokens.of_input(body["query"]) * max(1, pairs)
    return Need(query + tokens.of_input(documents) + tokens.of_fields(body, OF_RERANK), 0)


def _check_images(body: dict[str, Any]) -> None:
    if body.get("prompt") is None:
        raise BadRequest("the field 'prompt' is missing")
    expect(body, "prompt", str, "a string")
    number = body.get("n")
    if number is not None and (isinstance(number, bool) or not isinstance(number, int) or not 1 <= number <= MOST_IMAGES):
        raise BadRequest(f"the field 'n' must be an integer from 1 to {MOST_IMAGES}")


def _need_of_images(body: dict[str, Any]) -> Need:
    return Need(tokens.of_text(body["prompt"]) + tokens.of_fields(body, OF_IMAGES), 0)


def _check_recording(fields: dict[str, Any]) -> None:
    if "file" not in fields:
        raise BadRequest("the field 'file' is missing")


def _check_speech(body: dict[str, Any]) -> None:
    if body.get("input") is None:
        raise BadRequest("the field 'input' is missing")
    expect(body, "input", str, "a string")
    expect(body, "voice", (str, dict), "a string or an object")
    if body.get("stream_format") not in (None, "audio", "sse"):
        raise BadRequest("the field 'stream_format' must be 'audio' or 'sse'")


def _need_of_speech(body: dict[str, Any]) -> Need:
    return Need(tokens.of_text(body["input"]) + tokens.of_fields(body, OF_SPEECH), 0)


OPERATIONS = (
    *(
        Operation(path, "never", KINDS, _check_rerank, need=_need_of_rerank, is_optional=True)
        for path in ("/v1/rerank", "/rerank", "/v2/rerank")
    ),
    Operation("/v1/images/generations", "on request", KINDS, _check_images, None, ("data",), _need_of_images, is_optional=True),
    *(
        Operation(path, "on request", KINDS, _check_recording, is_optional=True, media=TRANSCRIPTS, is_form=True)
        for path in ("/v1/audio/transcriptions", "/v1/audio/translations")
    ),
    Operation("/v1/audio/speech", "by format", KINDS, _check_speech, need=_need_of_speech, is_optional=True, media=AUDIO),
)
