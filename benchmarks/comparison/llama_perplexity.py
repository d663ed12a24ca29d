"""Perplexity of a GGUF file in llama.cpp. A program: it runs in the Python that has ``llama_cpp``.

A job comes as JSON on stdin: {"path", "rows": [[token]], "threads"}. Each row is a text of its own. The answer is
{"loss": nats a token, "tokens": how many were predicted}. The first token of a row is predicted from nothing and not
counted. Memory: the model, and the logits of one row.
"""

from __future__ import annotations

import ctypes
import json
import sys
from collections.abc import Sequence
from typing import Any

import llama_cpp  # pyright: ignore[reportMissingImports]
import numpy as np


def main() -> None:
    """Do the job."""
    job = json.load(sys.stdin)
    llama_cpp.llama_backend_init()
    params = llama_cpp.llama_model_default_params()
    params.n_gpu_layers = 0
    model = llama_cpp.llama_model_load_from_file(job["path"].encode(), params)
    if not model:
        sys.exit("llama.cpp does not load it")
    longest = max(map(len, job["rows"]))
    settings = llama_cpp.llama_context_default_params()
    settings.n_ctx = settings.n_batch = settings.n_ubatch = longest
    settings.n_threads = settings.n_threads_batch = job["threads"]
    context = llama_cpp.llama_init_from_model(model, settings)
    size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    losses = [_losses(context, size, row) for row in job["rows"]]
    loss = np.concatenate(losses)
    json.dump({"loss": float(loss.mean()), "tokens": len(loss)}, sys.stdout)


def _losses(context: Any, size: int, row: Sequence[int]) -> np.ndarray[Any, Any]:
    """Nats of each token of a row but the first."""
    llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
    batch = llama_cpp.llama_batch_init(len(row), 0, 1)
    batch.n_tokens = len(row)
    for place, token in enumerate(row):
        batch.token[place], batch.pos[place] = token, place
        batch.n_seq_id[place], batch.seq_id[place][0] = 1, 0
        batch.logits[place] = 1
    if llama_cpp.llama_decode(context, batch):
        sys.exit("llama_decode failed")
    found = np.ctypeslib.as_array(llama_cpp.llama_get_logits(context), (len(row), size))[:-1]
    logits = found.astype(np.float64)
    llama_cpp.llama_batch_free(batch)
    top = logits.max(-1, keepdims=True)
    total = np.log(np.exp(logits - top).sum(-1)) + top[:, 0]
    return total - logits[np.arange(len(row) - 1), list(row[1:])]


_quiet = llama_cpp.llama_log_callback(lambda level, text, data: None)

if __name__ == "__main__":
    llama_cpp.llama_log_set(_quiet, ctypes.c_void_p())
    main()
