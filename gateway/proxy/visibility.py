"""The error for a model that a caller cannot use: it does not reveal which models exist."""

from gateway.auth.key import ADMIN_MODELS, Key
from gateway.core.errors import GatewayError, ModelNotAvailable, ModelNotFound
from gateway.dialects.model_names import canonical
from gateway.fleet.catalog import Catalog


def missing(asked: str, key: Key, catalog: Catalog) -> GatewayError:
    """Only a key that may pull any model learns that this one does not exist, so that Ollama's clients pull it."""
    name = canonical(asked)
    may_pull = ADMIN_MODELS in key.flags and not key.models.patterns
    if may_pull and not name.cloud and not catalog.is_known(name):
        return ModelNotFound(f"model {asked!r} not found")
    return ModelNotAvailable()
