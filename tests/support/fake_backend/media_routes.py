"""Rerankers, images, speech and transcriptions: as vLLM and its kin answer them; Ollama has only the transcriptions."""

import base64
import json
from collections.abc import Callable
from email.message import Message
from email.parser import BytesParser
from email.policy import HTTP
from typing import TYPE_CHECKING, Any

from tests.support.fake_backend.content import Json, ServerError, after_pause, split_evenly, text_of
from tests.support.fake_backend.scripts import Head, Piece, Received, Step, answer, sse, stream

if TYPE_CHECKING:
    from tests.support.fake_backend.answers import HealthyServer

JSON = "application/json"
PIXEL = base64.b64encode(b"\x89PNG one pixel").decode()
SPOKEN = "audio/mpeg"
TYPES = {
    "json": JSON,
    "verbose_json": JSON,
    "text": "text/plain; charset=utf-8",
    "srt": "application/x-subrip",
    "vtt": "text/vtt",
}
Route = Callable[["HealthyServer", Json], list[Step]]


def fields_of(healthy: "HealthyServer", request: Received) -> Json:
    """The fields of a JSON body or of a form; files as bytes."""
    fields = _form(request) if request.path in FORMS else _object(request)
    if not fields.get("model"):
        raise ServerError(400, "model is required")
    known = healthy.has if healthy.kind == "ollama" else healthy.models.__contains__
    if not known(fields["model"]):
        raise ServerError(404, f"The model `{fields['model']}` does not exist.")
    return fields


def _object(request: Received) -> Json:
    fields = json.loads(request.body)
    if not isinstance(fields, dict):
        raise ServerError(400, "Input should be a valid dictionary")
    return fields


def _form(request: Received) -> Json:
    head = f"Content-Type: {request.header('content-type')}\r\n\r\n".encode()
    message = BytesParser(policy=HTTP).parsebytes(head + request.body)
    return {_name(part): _value(part) for part in message.iter_parts()} if message.is_multipart() else {}


def _name(part: Message) -> str:
    return str(part.get_param("name", header="content-disposition"))


def _value(part: Message) -> Any:
    data = part.get_payload(decode=True)
    assert isinstance(data, bytes)
    return data if part.get_filename() is not None else data.decode()


def _rerank(healthy: "HealthyServer", fields: Json) -> list[Step]:
    documents = fields.get("documents") or fields.get("texts") or []
    tokens = sum(len((text_of(fields["query"]) + " " + text_of(document)).split()) for document in documents)
    results = [
        {"index": index, "relevance_score": round(1 / (index + 2), 3), "document": {"text": text_of(document)}}
        for index, document in enumerate(documents)
    ]
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    named = {"id": "score-1", "model": fields["model"], "usage": usage}
    return answer(200, {**named, "results": results[: fields.get("top_n") or None]}, JSON)


def _images(healthy: "HealthyServer", fields: Json) -> list[Step]:
    usage = {
        "input_tokens": len(fields["prompt"].split()),
        "output_tokens": 7,
        "total_tokens": 7 + len(fields["prompt"].split()),
    }
    if not fields.get("stream"):
        images = [{"b64_json": PIXEL}] * (fields.get("n") or 1)
        return after_pause(answer(200, {"created": 1787335200, "data": images, "usage": usage}, JSON), healthy.pause_s)
    events: list[Json] = [
        {"type": "image_generation.partial_image", "b64_json": PIXEL, "partial_image_index": index, "created_at": 1787335200}
        for index in range(healthy.pieces)
    ]
    events.append({"type": "image_generation.completed", "b64_json": PIXEL, "created_at": 1787335200, "usage": usage})
    return stream(sse(events, done=False), pause_s=healthy.pause_s)


def _speech(healthy: "HealthyServer", fields: Json) -> list[Step]:
    pieces = [piece.encode() for piece in split_evenly(healthy.text(fields["input"]), healthy.pieces)]
    if fields.get("stream_format") != "sse":
        return stream(pieces, SPOKEN, healthy.pause_s)
    events: list[Json] = [{"type": "speech.audio.delta", "audio": base64.b64encode(piece).decode()} for piece in pieces]
    usage = {"input_tokens": 3, "output_tokens": 5, "total_tokens": 8}
    return stream(sse([*events, {"type": "speech.audio.done", "usage": usage}], done=False), pause_s=healthy.pause_s)


def _transcription(healthy: "HealthyServer", fields: Json) -> list[Step]:
    file = fields.get("file")
    if not isinstance(file, bytes):
        raise ServerError(400, "file is required")
    text = healthy.text(f"{len(file)} bytes")
    form = fields.get("response_format", "json")
    if fields.get("stream") == "true" and healthy.kind == "openai":
        return _transcription_stream(healthy, text)
    if TYPES[form] == JSON:
        counted = {} if healthy.kind == "ollama" else {"usage": {"type": "duration", "seconds": 2}}
        return after_pause(answer(200, {"text": text, **counted}, JSON), healthy.pause_s)
    return [Head(200, [("Content-Type", TYPES[form])], content_length=len(text.encode())), Piece(text.encode())]


def _transcription_stream(healthy: "HealthyServer", text: str) -> list[Step]:
    events: list[Json] = [{"type": "transcript.text.delta", "delta": piece} for piece in split_evenly(text, healthy.pieces)]
    usage = {"type": "tokens", "input_tokens": 14, "output_tokens": 4, "total_tokens": 18}
    return stream(
        sse([*events, {"type": "transcript.text.done", "text": text, "usage": usage}], done=False), pause_s=healthy.pause_s
    )


FORMS: dict[str, Route] = {"/v1/audio/transcriptions": _transcription, "/v1/audio/translations": _transcription}
ROUTES: dict[str, Route] = {
    "/v1/rerank": _rerank,
    "/rerank": _rerank,
    "/v2/rerank": _rerank,
    "/v1/images/generations": _images,
    "/v1/audio/speech": _speech,
    **FORMS,
}
