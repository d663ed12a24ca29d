"""A model that coding agents can be tried with: long context, a chat template with tools and reasoning, nothing known.

Random weights of Qwen3-MoE's shape behind the demo's tokenizer, so that a whole request of an agent, 10,000 to 30,000
tokens, goes through every part of a server in seconds. One direction that all embeddings share leads to the end of an
answer, so answers are short.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch

import conmoe_edge
from tests.families import tiny_model

DEMO = Path(__file__).parents[2] / "conmoe_edge" / "data" / "demo"
CONTEXT = 65_536
BUDGET = "1200MB"
MARKS = (
    *("<|im_start|>", "<|im_end|>", "<think>", "</think>"),
    *("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"),
)
CONTROL = 2
"""So many of the marks are special tokens; the others are text to a client."""
END_SCORE = 11.0
"""Of the end of an answer, beside scores of about 0 ± 2 for 4,100 other tokens: some ten tokens."""
SPREAD = 8.0

TEMPLATE = """\
{%- set start = '<|im_start|>' %}
{%- set has_system = messages[0].role == 'system' %}
{%- if tools or has_system %}
    {{- start + 'system\\n' }}
    {%- if has_system %}{{ messages[0].content }}{% endif %}
    {%- if tools %}
        {{- '\\n\\nYou may call these functions:\\n<tools>' }}
        {%- for tool in tools %}{{ '\\n' }}{{ tool | tojson }}{% endfor %}
        {{- '\\n</tools>\\nA call: <tool_call>\\n{"name": NAME, "arguments": ARGUMENTS}\\n</tool_call>' }}
    {%- endif %}
    {{- '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'system' %}
        {%- if not loop.first %}{{ raise_exception('The system message has to be the first.') }}{% endif %}
    {%- elif message.role == 'tool' %}
        {{- start + 'user\\n<tool_response>\\n' + message.content + '\\n</tool_response><|im_end|>\\n' }}
    {%- else %}
        {{- start + message.role + '\\n' }}
        {%- if message.reasoning_content %}
            {{- '<think>\\n' + message.reasoning_content + '\\n</think>\\n\\n' }}
        {%- endif %}
        {{- message.content }}
        {%- for call in message.tool_calls or [] %}
            {{- '\\n<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' }}
            {{- call.function.arguments | tojson }}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- start + 'assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}
{%- endif %}
"""
"""In the manner of Qwen's: one system message, the first, and calls as JSON between marks."""


def write_model(folder: Path) -> Path:
    """The model as a plain checkpoint, about 1 MiB."""
    size, words = 64, 4096 + len(MARKS)
    end = 4096 + MARKS.index("<|im_end|>")
    model = tiny_model(
        "qwen3_moe",
        vocab_size=words,
        hidden_size=size,
        num_hidden_layers=2,
        head_dim=16,
        max_position_embeddings=CONTEXT,
        mlp_only_layers=[],
        eos_token_id=end,
        bos_token_id=None,
        pad_token_id=1,
    )
    with torch.no_grad():
        embedding, head = model.get_input_embeddings().weight, model.lm_head.weight
        embedding[:, 0] = 8.0
        # Behind the last norm this direction is about sqrt(size) long: the rest is small beside it.
        head *= SPREAD
        head[:, 0] = 0.0
        head[end] = 0.0
        head[end, 0] = END_SCORE / size**0.5
    model.generation_config.do_sample = True
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer = json.loads((DEMO / "tokenizer.json").read_text(encoding="utf-8"))
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    for number, mark in enumerate(MARKS):
        added = {"id": 4096 + number, "content": mark, **plain, "special": number < CONTROL}
        tokenizer["added_tokens"].append(added)
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    shutil.copy(DEMO / "tokenizer_config.json", folder)
    config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    config |= {"eos_token": "<|im_end|>", "model_max_length": CONTEXT, "chat_template": TEMPLATE}
    config.pop("additional_special_tokens", None)
    config.pop("bos_token", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def write_package(folder: Path) -> Path:
    """Its package, unchanged, with room for the whole context."""
    source, out = write_model(folder / "source"), folder / "out"
    conmoe_edge.fit(str(source), out, budget=BUDGET, device="cpu", context=CONTEXT)
    return out
