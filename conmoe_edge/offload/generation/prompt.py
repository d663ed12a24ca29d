"""Messages and text to tokens, and the tokens that end an answer.

What a user writes is text: ``<|im_end|>`` in a message is encoded as its characters and steers nothing, unless special
tokens are allowed. The template's own are control tokens. Where no message holds any, the tokens are those of
transformers' ``apply_chat_template``.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from conmoe_edge.errors import UsageError
from conmoe_edge.offload.generation.chat_template import shared
from conmoe_edge.offload.generation.control_tokens import ControlTokens, may_be_part
from conmoe_edge.offload.generation.named_templates import default_template
from conmoe_edge.offload.generation.text_origin import StandIns
from conmoe_edge.offload.generation.text_tokens import ALLOW, control_tokens_in, encode_apart

ROLES = ("system", "developer", "user", "assistant", "tool")
"""Roles that a template may write into a control token; others must not be a part of one."""

SYSTEM_ROLES = ("system", "developer")
"""Roles of what stands before a conversation."""

_LETTER = "a"


def prompt_tokens(
    tokenizer: Any,
    messages: Sequence[Mapping[str, Any]],
    *,
    allow_special_tokens: bool = False,
    stop_event: threading.Event | None = None,
    check: Callable[[str], None] | None = None,
    variables: Mapping[str, Any] | None = None,
) -> list[int]:
    """The prompt: the chat template's. For a model without one the last message alone, with the system text as text
    in front. For any thread.

    Args:
        tokenizer: of transformers.
        messages: ``{"role": ..., "content": ...}``, oldest first; plain JSON values.
        allow_special_tokens: whether control tokens that are spelt out in messages steer the model.
        stop_event: ends the rendering of the template once it is set.
        check: called with the text before it is tokenised; what it raises leaves the call.
        variables: what the template sees besides, such as ``tools``; plain JSON values.

    Raises:
        UsageError: there is no message, one is no text, or the template refuses them, writes nothing for them or goes
            over a limit.
        PackageError: the template cannot be read.
        ConmoeError: ``stop_event`` was set.
    """
    if not messages:
        raise UsageError("There is no message to answer.", "", "send at least one message")
    plain = [template_view(message) for message in messages]
    template = default_template(tokenizer)
    if not template:
        text = plain[-1].get("content")
        if not isinstance(text, str):
            raise UsageError("The last message has no text.", "", "send a message with text")
        if len(plain) > 1 and plain[0].get("role") in SYSTEM_ROLES:
            text = f"{plain[0].get('content')}\n\n{text}"
        if check is not None:
            check(text)
        return text_tokens(tokenizer, text, allow_special_tokens=allow_special_tokens)
    given, variables = variables or {}, template_variables(tokenizer)
    _check_variables(given, variables)
    variables |= given
    if allow_special_tokens:
        (text,) = shared.render(template, [plain], variables, stop_event)
        _check_written(text, plain)
        if check is not None:
            check(text or "")
        return list(tokenizer(text or "", add_special_tokens=False).input_ids)
    control = ControlTokens.of(tokenizer, template)
    _check_no_control(given, control)
    for message in plain:
        _check_role(message.get("role"), control)
    stand_ins = StandIns(plain, template, shared.looked_for(template), control)
    text, marked = shared.render(template, [plain, stand_ins.messages], variables, stop_event)
    assert text is not None, "only the second one may be missing"
    _check_written(text, plain)
    if check is not None:
        check(text)
    if marked is not None and stand_ins.restored(marked) == text:
        return encode_apart(
            tokenizer, text, lambda begin, end: stand_ins.any_in(marked[begin:end]), control
        )
    # The template changes messages, as with ``| upper``. Then none of the control tokens may be theirs.
    steering = control_tokens_in(tokenizer, text, control)
    if marked is None or control_tokens_in(tokenizer, marked, control) != steering:
        raise UsageError(
            "The control tokens in these messages cannot be told from the chat template's own.",
            "the template does not write the messages as they are",
            f"messages without {_example(plain, control)}; {ALLOW}",
        )
    return list(tokenizer(text, add_special_tokens=False).input_ids)


def text_tokens(tokenizer: Any, text: str, *, allow_special_tokens: bool = False) -> list[int]:
    """A text that no template is put around, with the tokens that the tokenizer begins and ends texts with.

    Raises:
        UsageError: it is no text, or a control token in it cannot be written as text.
    """
    _check_text(text)
    whole = list(tokenizer(text).input_ids)
    if allow_special_tokens:
        return whole
    control = ControlTokens.of(tokenizer, default_template(tokenizer))
    safe = encode_apart(tokenizer, text, lambda begin, end: end > begin, control)
    body = list(tokenizer(text, add_special_tokens=False).input_ids)
    if safe == body:
        return whole
    before = _tokens_before(tokenizer)
    if whole[before : before + len(body)] != body:
        raise UsageError(
            "The control tokens in this text cannot be told from those that the tokenizer adds.",
            "",
            ALLOW,
        )
    return whole[:before] + safe + whole[before + len(body) :]


def _tokens_before(tokenizer: Any) -> int:
    """How many tokens the tokenizer begins a text with."""
    whole, body = (
        tokenizer(_LETTER).input_ids,
        tokenizer(_LETTER, add_special_tokens=False).input_ids,
    )
    starts = range(len(whole) - len(body) + 1)
    return next((n for n in starts if whole[n : n + len(body)] == body), 0)


def template_variables(tokenizer: Any) -> dict[str, Any]:
    """What a chat template sees besides the messages."""
    return {
        "tools": None,
        "documents": None,
        "add_generation_prompt": True,
        **tokenizer.special_tokens_map,
    }


def _check_variables(given: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """What a caller gives a template replaces none of its own variables but ``tools`` and ``documents``."""
    taken = ((own.keys() | {"messages"}) - {"tools", "documents"}) & given.keys()
    if taken:
        raise UsageError(f"The template variable {min(taken)} cannot be given.", "", "leave it out")
    _check_text(json.dumps(given, ensure_ascii=False))


def _check_no_control(given: Mapping[str, Any], control: ControlTokens) -> None:
    """What is not in a message cannot be told from the template's own text, so it may not have control tokens."""
    said = json.dumps(given, ensure_ascii=False)
    found = next((token for token in sorted(control.special) if token in said), None)
    if found is not None:
        raise UsageError(
            f"{found!r} is a control token of this model, and cannot stand in tools or template variables.",
            "",
            f"leave it out; {ALLOW}",
        )


def template_view(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message as transformers gives it to a template: nothing that is ``None``, reasoning under each of its names.

    Raises:
        UsageError: it is no text.
    """
    plain = {key: value for key, value in message.items() if value is not None}
    names = ("reasoning_content", "thinking", "reasoning")
    reasoning = next((plain[name] for name in names if name in plain), None)
    if reasoning is not None:
        plain = {"thinking": reasoning, **plain, "reasoning_content": reasoning}
    _check_text(json.dumps(plain, ensure_ascii=False))
    return plain


def end_tokens(model: Any, tokenizer: Any) -> frozenset[int]:
    """What ends an answer, by the model's generation config and its tokenizer."""
    ends = model.generation_config.eos_token_id
    found = set(ends) if isinstance(ends, (list, tuple)) else {ends}
    found.add(tokenizer.eos_token_id)
    return frozenset(token for token in found if token is not None)


def _check_written(text: str | None, messages: Sequence[Mapping[str, Any]]) -> None:
    """Blanks alone have lost the question, unless the messages have no more than that."""
    said = any(str(message.get("content") or "").strip() for message in messages)
    if said and not (text or "").strip():
        raise UsageError(
            "The model's chat template writes nothing for these messages.",
            "",
            "other messages, or a package whose chat_template.jinja is mended",
        )


def _check_text(text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UsageError(
            "A message is no text.",
            "it holds half of a character, or bytes that are not UTF-8",
            "send it as UTF-8",
        ) from error


def _check_role(role: Any, control: ControlTokens) -> None:
    if role in ROLES:
        return
    if not isinstance(role, str) or any(may_be_part(role, token) for token in control.texts):
        raise UsageError(f"There is no role {role!r}.", "", f"one of {', '.join(ROLES)}; {ALLOW}")


def _example(messages: Sequence[Mapping[str, Any]], control: ControlTokens) -> str:
    said = json.dumps(messages, ensure_ascii=False)
    return next((token for token in sorted(control.texts) if token in said), "control tokens")
