"""The list of models as Codex reads it: the field `models` beside `data` in the answer of /v1/models."""

from collections.abc import Collection, Iterable, Mapping
from typing import Any

# Codex sends these as `instructions` for a model that it finds in this list.
INSTRUCTIONS = """\
You are a coding agent in a terminal on the user's computer. You work in the user's project: you read files, run commands \
and change code with the tools that you are given, until the task is done.

- Read before you change: the files and tests that the task touches, and the style that you find there. Obey the \
instructions in AGENTS.md files; the nearest one counts most, and what the user writes counts more.
- Do the work yourself with the tools instead of describing it. Keep going until the task is done, then stop.
- Change what the task asks for and nothing else. Fix the cause of a fault, not its symptom.
- To edit files use apply_patch if you have it. Its input begins with the line "*** Begin Patch" and ends with the line \
"*** End Patch". Between them each file has a line "*** Add File: path", "*** Delete File: path" or "*** Update File: \
path". The lines of a new file begin with "+". A change begins with a line "@@", which may name its function; unchanged \
lines begin with a blank, removed lines with "-" and new lines with "+". Give three unchanged lines around each change.
- Search with rg if it is there. Commands run in a sandbox: if one is refused, explain why you need it.
- Check your work: run the tests or the program if you can. Report honestly what you did not check.
- Never throw away changes that you did not make, and never commit unless the user asks for it.
- Write to the user briefly and plainly. Name files by their paths. End with a short report of what you changed.
"""
TRUNCATION = {"mode": "bytes", "limit": 10_000}


def codex_models(
    ids: Iterable[str], contexts: Mapping[str, int] | None = None, sees: Collection[str] = ()
) -> list[dict[str, Any]]:
    """`contexts` has the contexts of models in tokens, as far as they are known; `sees` are the models that take images.

    The fields are those that some version of Codex requires. A model that is not in the list, or an empty list, makes Codex
    use its own instructions and a context of its own choice.
    """
    return [_model(name, place, (contexts or {}).get(name, 0), name in sees) for place, name in enumerate(ids)]


def _model(name: str, place: int, context: int, sees: bool) -> dict[str, Any]:
    return {
        "slug": name,
        "display_name": name,
        "description": None,
        "supported_reasoning_levels": [],
        "shell_type": "shell_command",
        "visibility": "list",
        "supported_in_api": True,
        "priority": place,
        "availability_nux": None,
        "upgrade": None,
        "base_instructions": INSTRUCTIONS,
        "model_messages": {"instructions_template": INSTRUCTIONS, "instructions_variables": None},
        "supports_reasoning_summaries": True,
        "support_verbosity": False,
        "default_verbosity": None,
        "apply_patch_tool_type": "freeform",
        "web_search_tool_type": "text",
        "truncation_policy": dict(TRUNCATION),
        "supports_parallel_tool_calls": True,
        **({"context_window": context, "max_context_window": context} if context > 0 else {}),
        "effective_context_window_percent": 95,
        "experimental_supported_tools": [],
        "input_modalities": ["text", "image"] if sees else ["text"],
        "supports_search_tool": False,
    }
