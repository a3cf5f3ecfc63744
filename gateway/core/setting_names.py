"""Refuses unknown names of settings: those with our prefix, and in `.env` those that are similar to a setting."""

import difflib
import re
from collections.abc import Collection, Mapping

from gateway.core.errors import SettingsError

# A Kubernetes Service whose name begins with "gateway" sets these in every container.
KUBERNETES_SERVICE_LINK = re.compile(r"GATEWAY_(\w+_)?(SERVICE_(HOST|PORT(_\w+)?)|PORT_\d+_(TCP|UDP|SCTP)(_\w+)?)")
KUBERNETES_SERVICE_PORT = re.compile(r"(tcp|udp|sctp)://\S+")
# Ollama reads these; it may share the `.env`.
OF_OLLAMA = frozenset({"OLLAMA_LOAD_TIMEOUT", "OLLAMA_HOST", "OLLAMA_MODELS"})
NEARLY = 0.88


def refuse_unknown(environ: Mapping[str, str], of_file: Mapping[str, str], known: Collection[str]) -> None:
    """Raises SettingsError. The environment also belongs to others, so only names with our prefix are checked there."""
    for name, value in [*environ.items(), *of_file.items()]:
        if not name.startswith("GATEWAY_") or name in known or _is_service_link(name, value):
            continue
        close = difflib.get_close_matches(name, known, 1)
        raise _unknown(name, f"did you mean {close[0]}?" if close else "see .env.example for every name")
    for name in of_file:
        if name not in known and name not in OF_OLLAMA and (meant := _meant(name.upper(), known)):
            raise _unknown(name, f"did you mean {meant}?")


def _unknown(name: str, advice: str) -> SettingsError:
    return SettingsError(f"{name} is not a setting of the gateway: {advice}")


def _meant(name: str, known: Collection[str]) -> str:
    close = difflib.get_close_matches(name, known, 1, NEARLY)
    return close[0] if close else next((one for one in sorted(known) if one == f"{name}_ENABLED"), "")


def _is_service_link(name: str, value: str) -> bool:
    is_port = name.endswith("_PORT") and KUBERNETES_SERVICE_PORT.fullmatch(value)
    return bool(is_port or KUBERNETES_SERVICE_LINK.fullmatch(name))
