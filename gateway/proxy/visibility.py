"""What a caller is told of a model that it cannot have."""

from gateway.auth.key import ADMIN_MODELS, Key
from gateway.core.errors import GatewayError, ModelNotAvailable, ModelNotFound
from gateway.dialects.model_names import canonical
from gateway.fleet.catalog import Catalog


def missing(asked: str, key: Key, catalog: Catalog) -> GatewayError:
    """Whether it is there is told only to who may put any model there, so that Ollama's clients pull it."""
    name = canonical(asked)
    may_pull = ADMIN_MODELS in key.flags and not key.models.patterns
    if may_pull and not name.cloud and name.canonical not in catalog.models:
        return ModelNotFound(f"model {asked!r} not found")
    return ModelNotAvailable()
