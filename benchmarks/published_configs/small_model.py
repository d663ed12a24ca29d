"""A small model with random weights and a tokenizer, written as a publisher would."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from benchmarks.published_configs.build import build
from benchmarks.published_configs.shrink import VOCABULARY

_SPREAD, _EMBEDDING_SPREAD, _BIAS_SPREAD = 0.08, 0.5, 0.02
MOST_NUMBERS = 20_000_000
_COMPUTED = ("norm", "scale", "scalar", "A_log", "dt_bias", "inv_freq")


def write_small(config: dict[str, Any], folder: Path, seed: int = 0) -> int:
    """Write the model of ``config`` into ``folder``, in fp32; returns how many numbers it has.

    Raises:
        ValueError: the config is not small.
    """
    meta = build(config, torch.float32, "meta")
    numbers = sum(one.numel() for one in meta.parameters())
    if numbers > MOST_NUMBERS:
        raise ValueError(f"the shrunk model has {numbers:,} numbers")
    torch.manual_seed(seed)
    model = build(config, torch.float32, "cpu")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if parameter.dim() >= 2:
                spread = _EMBEDDING_SPREAD if "embed" in name else _SPREAD
                parameter.normal_(0.0, spread, generator=generator)
            elif not any(word in name for word in _COMPUTED):
                parameter.normal_(0.0, _BIAS_SPREAD, generator=generator)
    model.save_pretrained(folder)
    _save_tokenizer(folder)
    return numbers


def _save_tokenizer(folder: Path) -> None:
    """One token for each character."""
    letters = [chr(code) for code in range(33, 33 + VOCABULARY - 5)]
    words = ["<pad>", "<s>", "</s>", "<unk>", "\u2581", *letters]
    tokenizer = Tokenizer(
        models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(), pre_tokenizers.Split("", "isolated")]
    )
    tokenizer.decoder = decoders.Sequence([decoders.Fuse(), decoders.Metaspace()])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
    ).save_pretrained(folder)
