"""What llama.cpp makes of a GGUF file. Run by a Python that has ``llama_cpp``; a job as JSON comes on stdin.

The job is {"path", "prompt": [token], "steps": n, "texts": [str], "vocabulary": bool}; the last is for a file of a
vocabulary alone. The answer, as JSON on stdout, has the greedy tokens after the prompt and the tokens of each text;
the logits of all positions are in ``path + ".npy"``.
"""

from __future__ import annotations

import ctypes
import json
import sys
from typing import Any

import llama_cpp  # pyright: ignore[reportMissingImports]
import numpy as np


def main() -> None:
    job = json.load(sys.stdin)
    llama_cpp.llama_backend_init()
    model = _load(job["path"], job.get("vocabulary", False))
    vocab = llama_cpp.llama_model_get_vocab(model)
    size = llama_cpp.llama_vocab_n_tokens(vocab)
    answer: dict[str, Any] = {
        "texts": [_tokens(vocab, text) for text in job.get("texts", [])],
        "begins": bool(llama_cpp.llama_vocab_get_add_bos(vocab)),
        "eos": llama_cpp.llama_vocab_eos(vocab),
    }
    if job.get("prompt"):
        answer["tokens"], logits = _greedy(model, size, job["prompt"], job["steps"])
        np.save(job["path"] + ".npy", logits)
    json.dump(answer, sys.stdout)


def _load(path: str, vocabulary: bool) -> Any:
    params = llama_cpp.llama_model_default_params()
    params.n_gpu_layers = 0
    params.vocab_only = vocabulary
    params.use_extra_bufts = False
    model = llama_cpp.llama_model_load_from_file(path.encode(), params)
    if not model:
        sys.exit("llama.cpp does not load it")
    return model


def _greedy(model: Any, size: int, prompt: list[int], steps: int) -> tuple[list[int], Any]:
    settings = llama_cpp.llama_context_default_params()
    settings.n_ctx = len(prompt) + steps + 8
    settings.n_batch = settings.n_ubatch = 512
    settings.n_threads = settings.n_threads_batch = 1
    settings.type_k = settings.type_v = 0  # fp32
    settings.flash_attn_type = 0
    context = llama_cpp.llama_init_from_model(model, settings)
    tokens, rows, feed = [], [], prompt
    for _ in range(steps):
        for token in feed:
            array = (llama_cpp.llama_token * 1)(token)
            if llama_cpp.llama_decode(context, llama_cpp.llama_batch_get_one(array, 1)):
                sys.exit("llama_decode failed")
            found = llama_cpp.llama_get_logits_ith(context, -1)
            rows.append(np.ctypeslib.as_array(found, (size,)).copy())
        feed = [int(rows[-1].argmax())]
        tokens += feed
    return tokens, np.stack(rows)


def _tokens(vocab: Any, text: str) -> list[int]:
    data = text.encode()
    room = (llama_cpp.llama_token * (len(data) + 8))()
    count = llama_cpp.llama_tokenize(vocab, data, len(data), room, len(room), False, False)
    return list(room[:count])


_quiet = llama_cpp.llama_log_callback(
    lambda level, text, data: sys.stderr.write(text.decode(errors="replace")) and None
)

if __name__ == "__main__":
    llama_cpp.llama_log_set(_quiet, ctypes.c_void_p())
    main()
