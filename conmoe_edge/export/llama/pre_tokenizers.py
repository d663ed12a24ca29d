"""How a text is cut before byte-pair encoding, under the names that llama.cpp knows the ways of cutting by.

A GGUF file does not hold the pattern but a name, and llama.cpp has a pattern of its own for each. ``name_of`` gives a
name only where the steps in ``tokenizer.json`` are exactly those that the name stands for; a name that is merely close
would cut some texts otherwise, and nothing would say so.

llama.cpp normalises nothing: texts that are not in Unicode's form C, which these tokenizers would bring into it, are
the one difference that is let through.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from conmoe_edge.errors import UnsupportedModel

FIX = "--pre-tokenizer NAME with llama.cpp's name of it, if you know that it has one"

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_BLANKS = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_WORDS = _ENDINGS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|" + _BLANKS
_MARKED_WORDS = (
    _ENDINGS + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|" + _BLANKS
)
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED_WORDS = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_ENDINGS}?"
    rf"|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_ENDINGS}?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|" + _BLANKS
)


@dataclass(frozen=True, slots=True)
class PreTokenizer:
    """One of llama.cpp's ways of cutting.

    Attributes:
        name: ``tokenizer.ggml.pre``.
        steps: the patterns that cut, one after the other.
        whole_words: whether a word that is a token is taken without looking at the merges (``ignore_merges``).
        inexact: which texts llama.cpp cuts otherwise all the same, because its own pattern under this name is another.
    """

    name: str
    steps: tuple[str, ...]
    whole_words: bool = False
    inexact: str = ""


KNOWN = (
    PreTokenizer("gpt-2", (_GPT2,)),
    PreTokenizer("smollm", (r"\p{N}", _GPT2)),
    PreTokenizer("qwen2", (_WORDS % r"\p{N}",)),
    PreTokenizer("qwen35", (_MARKED_WORDS,)),
    PreTokenizer("llama-bpe", (_WORDS % r"\p{N}{1,3}",), whole_words=True),
    PreTokenizer("dbrx", (_WORDS % r"\p{N}{1,3}",)),
    PreTokenizer(
        "gpt-4o",
        (_CASED_WORDS,),
        inexact="words with combining marks (Thai, Hindi) and with capitals of other alphabets than ours inside",
    ),
)


def names_of(tokenizer: Mapping[str, Any]) -> tuple[PreTokenizer, ...]:
    """Those of ``KNOWN`` that cut as a byte-level tokenizer does.

    Args:
        tokenizer: its ``tokenizer.json``.

    Raises:
        UnsupportedModel: there is none; says what the tokenizer does.
    """
    steps = tuple(_steps(tokenizer.get("pre_tokenizer")))
    found = tuple(one for one in KNOWN if one.steps == steps)
    if not found:
        raise unknown("its pre-tokenizer is none whose name in llama.cpp is known: " + repr(steps))
    return found


def unknown(why: str) -> UnsupportedModel:
    """The error for a tokenizer that no name stands for."""
    return UnsupportedModel(
        "llama.cpp would cut texts otherwise than this tokenizer does.", why[:300], FIX
    )


def _steps(node: Any) -> Iterator[str]:
    """The patterns of a pre-tokenizer, in their order."""
    kind = node.get("type") if isinstance(node, Mapping) else None
    if kind == "Sequence":
        for one in node["pretokenizers"]:
            yield from _steps(one)
    elif kind == "Digits" and node.get("individual_digits"):
        yield r"\p{N}"
    elif kind == "Split" and _keeps_all(node) and "Regex" in node["pattern"]:
        yield node["pattern"]["Regex"]
    elif kind == "ByteLevel" and not node.get("add_prefix_space"):
        if node.get("use_regex", True):
            yield _GPT2
    else:
        raise unknown(f"its pre-tokenizer has a step {kind} that llama.cpp has no name for")


def _keeps_all(node: Mapping[str, Any]) -> bool:
    """Whether each match of a pattern becomes a piece, and so does what is between them. The patterns here match every
    character, so dropping what is between them is the same.
    """
    behavior, invert = node.get("behavior"), bool(node.get("invert"))
    return (behavior, invert) in (("Isolated", False), ("Removed", True), ("Isolated", True))
