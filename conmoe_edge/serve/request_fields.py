"""What becomes of fields that are not honoured: accepted in silence, accepted and named, or refused.

- *Harmless* ones change no answer.
- *Hints* ask for a style that nothing here can force; they are accepted, and the response's ``X-Conmoe-Ignored`` names
  them. So it is with fields nobody knows, unless the server is strict.
- The others would change an answer, so each is refused unless it has a value with which it asks for nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from conmoe_edge.serve.http_errors import ApiError

HARMLESS = frozenset(
    {
        "cache_prompt",
        "id_slot",
        "keep_alive",
        "metadata",
        "prompt_cache_key",
        "prompt_cache_retention",
        "safety_identifier",
        "service_tier",
        "store",
        "timings_per_token",
    }
)
HINTS = frozenset({"verbosity"})
ASKS_FOR_NOTHING: dict[str, tuple[Any, ...]] = {
    "audio": (None,),
    "best_of": (None, 1),
    "continue_final_message": (None, False),
    "dry_multiplier": (None, 0, 0.0),
    "function_call": (None, "none"),
    "functions": (None, []),
    "grammar": (None, ""),
    "guided_choice": (None,),
    "guided_grammar": (None,),
    "guided_json": (None,),
    "guided_regex": (None,),
    "ignore_eos": (None, False),
    "images": (None, []),
    "length_penalty": (None, 1, 1.0),
    "min_tokens": (None, 0),
    "mirostat": (None, 0),
    "modalities": (None, ["text"]),
    "prediction": (None,),
    "prompt_logprobs": (None, 0, False),
    "stop_token_ids": (None, []),
    "structured_outputs": (None,),
    "suffix": (None, ""),
    "tfs_z": (None, 1, 1.0),
    "typical_p": (None, 1, 1.0),
    "use_beam_search": (None, False),
    "web_search_options": (None,),
    "xtc_probability": (None, 0, 0.0),
}
OTHER_NAMES = {"repeat_penalty": "repetition_penalty"}
"""What other servers call a field that is honoured."""


def sift(value: dict[str, Any], honoured: frozenset[str], strict: bool) -> list[str]:
    """Take everything that is not ``honoured`` out of a request; the names that should be said.

    Raises:
        ApiError: a field would change the answer and is not supported. Unknown ones stay where the server is
            ``strict``, to be refused with the others that are wrong.
    """
    ignored = []
    for name in list(value):
        if name in OTHER_NAMES and OTHER_NAMES[name] not in value:
            value[OTHER_NAMES[name]] = value.pop(name)
        elif name in honoured:
            continue
        elif name in ASKS_FOR_NOTHING:
            refuse_wish(name, value.pop(name), ASKS_FOR_NOTHING[name])
        elif name in HARMLESS:
            del value[name]
        elif name in HINTS or not strict:
            ignored.append(name)
            del value[name]
    return ignored


def refuse_wish(
    name: str,
    value: Any,
    nothings: Sequence[Any],
    why: str = "is not supported by this server.",
) -> None:
    """Let a field through that asks for nothing.

    Raises:
        ApiError: its value is none of ``nothings``, of the same type: 0 is not ``False``.
    """
    if not any(type(value) is type(one) and value == one for one in nothings):
        raise ApiError(400, f"{name} {why}", param=name, code="unsupported_parameter")
