"""Ollama's /api/embed and the older /api/embeddings as client's dialects."""

from gateway.core.errors import BadRequest
from gateway.dialects.dialect import Usage
from gateway.dialects.fields import boolean, expect
from gateway.dialects.translation import native_fields as fields
from gateway.dialects.translation.embeddings import Embedding, Vectors
from gateway.dialects.translation.native_records import UNTIMED, Durations, Fields, metrics


def read_embed(body: Fields) -> Embedding:
    """Raises BadRequest on what cannot be read. A request without texts only loads or unloads its model."""
    texts = body.get("input")
    if isinstance(texts, str):
        texts = [texts] if texts else []
    if texts is not None and not (isinstance(texts, list) and all(isinstance(text, str) for text in texts)):
        raise BadRequest("the field 'input' must be a string or a list of strings")
    truncate = boolean(body, "truncate", default=False) if body.get("truncate") is not None else None
    dropped = [name for name in fields.dropped_of(body) if name != "truncate"]
    return Embedding(texts or [], _dimensions(body), truncate, dropped)


def read_embeddings(body: Fields) -> Embedding:
    """The same for /api/embeddings."""
    expect(body, "prompt", str, "a string")
    return Embedding([body["prompt"]] if body.get("prompt") else [], dropped=fields.dropped_of(body))


def write_embed(vectors: Vectors, model: str, durations: Durations = UNTIMED) -> Fields:
    counted = metrics(Usage(vectors.usage.prompt_tokens), Durations(durations.total, durations.load))
    return {"model": model, "embeddings": vectors.vectors, **counted}


def write_embeddings(vectors: Vectors) -> Fields:
    return {"embedding": vectors.vectors[0] if vectors.vectors else []}


def _dimensions(body: Fields) -> int | None:
    """Ollama takes zero as the model's own size."""
    expect(body, "dimensions", int, "a whole number")
    dimensions = body.get("dimensions")
    if dimensions is not None and not 0 <= dimensions < 2**31:
        raise BadRequest("the field 'dimensions' is out of range")
    return dimensions or None
