"""`POST /api/show` for models that only OpenAI-compatible servers have: such servers cannot be asked."""

from typing import Any

from gateway.fleet.catalog import Model, context_of


def described(model: Model) -> dict[str, Any]:
    """What clients read of a model before they chat; unknown facts are left empty, never invented."""
    info: dict[str, Any] = {"general.architecture": "unknown"}
    if length := context_of(model.openai):
        info["unknown.context_length"] = length
    return {
        "modelfile": "",
        "parameters": "",
        "template": "",
        "details": model.native["details"],
        "model_info": info,
        "capabilities": model.native.get("capabilities") or ["completion"],
        "modified_at": model.native["modified_at"],
    }
