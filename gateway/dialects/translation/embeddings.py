"""The backend's /v1/embeddings: texts in, one vector for each out."""

import binascii
import struct
from dataclasses import dataclass, field
from typing import Any

from gateway.dialects.dialect import Usage
from gateway.dialects.openai import OpenAI
from gateway.dialects.translation.unreadable import Unreadable

BYTES_OF_NUMBER = 4
_openai = OpenAI()


@dataclass(slots=True)
class Embedding:
    """A request to embed texts; without any, nothing is asked of the backend.

    `truncate` cuts texts that exceed the model's context; None leaves that to the backend.
    """

    texts: list[str]
    dimensions: int | None = None
    truncate: bool | None = None
    dropped: list[str] = field(default_factory=list)


@dataclass(slots=True)
class Vectors:
    """The vector of each text, in the order of the texts."""

    vectors: list[list[float]]
    usage: Usage = field(default_factory=Usage)


def embeddings_body_of(embedding: Embedding, model: str) -> dict[str, Any]:
    body: dict[str, Any] = {"model": model, "input": embedding.texts, "encoding_format": "float"}
    if embedding.dimensions is not None:
        body["dimensions"] = embedding.dimensions
    if embedding.truncate:
        # vLLM cuts at the model's context then; others ignore it and refuse a text that is too long.
        body["truncate_prompt_tokens"] = -1
    return body


def embeddings_reply_of(answer: Any, texts: int) -> Vectors:
    """Raises Unreadable unless the answer has a vector for each of so many texts."""
    data = answer.get("data") if isinstance(answer, dict) else None
    if not isinstance(data, list) or len(data) != texts or not all(isinstance(entry, dict) for entry in data):
        raise Unreadable("the answer has not one vector for each text")
    places = [entry.get("index") for entry in data]
    if sorted(place for place in places if place.__class__ is int) == list(range(texts)):
        data = sorted(data, key=lambda entry: entry["index"])
    return Vectors([_vector(entry.get("embedding")) for entry in data], _openai.usage_of(answer))


def _vector(embedding: Any) -> list[float]:
    """A list of numbers, or base64 of 32-bit numbers, the last byte the most significant."""
    if isinstance(embedding, str):
        try:
            data = binascii.a2b_base64(embedding.encode("ascii", "replace"), strict_mode=True)
            return list(struct.unpack(f"<{len(data) // BYTES_OF_NUMBER}f", data))
        except (binascii.Error, struct.error):
            raise Unreadable("the answer has a vector that is not base64 of 32-bit numbers") from None
    if not isinstance(embedding, list) or not all(number.__class__ in (float, int) for number in embedding):
        raise Unreadable("the answer has a vector that is not a list of numbers")
    return embedding
