"""`config`: the settings in force and their sources."""

import json

from tests.support.operator import CANARY, Operator


def test_config_shows_values_and_where_they_come_from(operator: Operator) -> None:
    (operator.folder / ".env").write_text("MAX_REQUEST_BODY_BYTES=70000\n")
    (operator.folder / "token").write_text(CANARY)
    names = {"DATABASE_URL": f"postgresql://u:{CANARY}@h/d", "REDIS_URL": f"redis://:{CANARY}@h/0"}
    names |= {"OLLAMA_AUTH_TOKEN_FILE": str(operator.folder / "token")}
    printed, rows = operator.gets("config", **names), operator.gets_json("config", **names).rows
    found = {row["name"]: (row["value"], row["from"]) for row in rows}
    assert found["MAX_REQUEST_BODY_BYTES"] == ("70000", ".env") and found["MAX_NUM_PREDICT"] == ("32768", "default")
    assert found["DATABASE_URL"] == ("postgresql://u:***@h/d", "environment")
    assert found["OLLAMA_AUTH_TOKEN"] == ("***", "OLLAMA_AUTH_TOKEN_FILE")
    assert CANARY not in printed + json.dumps(rows) and len(printed.splitlines()) == len(rows) + 1
