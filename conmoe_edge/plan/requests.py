"""What a server holds for the requests that it has not answered, so that it stays inside the budget with the model.

On a CPU, where the process shares the RAM with the model; on a GPU it is the host's memory, which no budget counts.
T = bytes of the longest text that is tokenised, B = bytes of the longest body, N = tokens of context, M = the budget:

=======================  ==========================================================================
bodies, texts, tokens    max(1 MiB, M / 512), at most 64 MiB: ``serve/intake.py`` keeps the account
one text in tokens       180·T: the tokenizer's tables, measured over English, Chinese, blanks and
                         runs of one letter (59 to 177 bytes a byte, tokenizers 0.23)
one body in values       4·B: the text as Python has it, and what is made of it
running answers          128·N: their tokens, in four lists
=======================  ==========================================================================

Python's share of a plan has ``PYTHON_TEXT_BYTES`` for texts that are looked at, as ``chat`` does with its prompts; the
term is what goes beyond. A text or a body may be so long that the term stays inside a sixteenth of the budget.
Arithmetic only.
"""

from __future__ import annotations

from dataclasses import dataclass

from conmoe_edge.units import KIB, MIB

TOKENISING_BYTES = 180
PARSING_BYTES = 4
ANSWER_BYTES = 128
PYTHON_TEXT_BYTES = 16 * MIB
LARGEST_BODY = MIB
ESCAPED_BYTES = 6
"""JSON may write a character that takes one byte with six."""
FRAME_BYTES = 64 * KIB
"""Of a body, what stands around the texts: names of fields and roles, 512 messages of them."""
SHARE = 16


@dataclass(frozen=True, slots=True)
class RequestSizes:
    """What requests may hold, in bytes.

    Attributes:
        account: of all of them together, before they are answered.
        text: of one text that is tokenised.
        body: of one request.
        nbytes: what the plan sets aside for all of it.
    """

    account: int
    text: int
    body: int
    nbytes: int


def request_sizes(budget: int, context: int, longest_token: int | None) -> RequestSizes:
    """The sizes for a budget of so many bytes.

    Args:
        budget: of the device.
        context: tokens of a conversation.
        longest_token: most bytes of a text to one of its tokens; ``None`` where that is not known.
    """
    account = min(64 * MIB, max(MIB, budget // 512))
    text = LARGEST_BODY if longest_token is None else min(LARGEST_BODY, context * longest_token)
    body = min(LARGEST_BODY, ESCAPED_BYTES * text + FRAME_BYTES)
    spare = max(0, budget // SHARE - account - ANSWER_BYTES * context) + PYTHON_TEXT_BYTES
    text = min(text, (spare - PARSING_BYTES * body) // TOKENISING_BYTES)
    looking = TOKENISING_BYTES * text + PARSING_BYTES * body
    held = account + ANSWER_BYTES * context
    return RequestSizes(account, text, body, held + max(0, looking - PYTHON_TEXT_BYTES))
