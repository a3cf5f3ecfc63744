"""Keys as shown to operators: rights and limits as text, never a secret."""

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from gateway.auth.key import OPTIONS
from gateway.core import strict_json
from gateway.limits.quota import NAMES as LIMITS
from gateway.limits.quota import UNLIMITED


def of_row(row: Mapping[str, Any]) -> dict[str, Any]:
    now = datetime.now(UTC)
    has_expired = row["expires_at"] is not None and row["expires_at"] <= now
    state = "revoked" if row["revoked_at"] else "expired" if has_expired else "active"
    facts = {
        name: row[name] for name in ("id", "name", "models", *LIMITS, "rules", *OPTIONS, "flags", "prompt_log", "created_at")
    }
    facts |= {name: row[name] for name in ("expires_at", "last_used_at", "secrets")}
    facts["models"] = list(row["models"]) or ["(all)"]
    facts |= shown_limits(row)
    facts["rules"] = [_rule_text(rule) for rule in strict_json.read_loosely(row["rules"].encode())]
    return {**facts, "state": state}


def shown_limits(row: Mapping[str, Any]) -> dict[str, object]:
    """Each limit as an operator writes it, None if the default applies; and the options, which only whole keys have."""
    limits = {name: "unlimited" if row[name] == UNLIMITED else row[name] for name in LIMITS}
    return limits | {name: row[name] for name in OPTIONS if name in row}


def _rule_text(rule: Mapping[str, Any]) -> str:
    limits = [f"{name}={value}" for name, value in shown_limits(rule).items() if value is not None]
    return f"{rule['pattern']}: {', '.join(limits)}"
