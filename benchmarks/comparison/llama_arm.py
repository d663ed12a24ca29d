"""The arm of llama.cpp: one GGUF file, memory-mapped, through ``llama_cpp``'s low-level calls.

Runs in the environment that has ``llama_cpp``; imports no torch. ``repack`` lets llama.cpp copy
quantised weights into a layout that its kernels prefer (its default): faster, but the copies are
no longer pages of the file that the kernel may drop. Both ways are arms of the comparison.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import gguf  # pyright: ignore[reportMissingImports]
import llama_cpp  # pyright: ignore[reportMissingImports]
import numpy as np

from benchmarks.comparison.clock import Arm, main


class LlamaArm(Arm):
    """Prompt and steps are ``llama_decode``; the next token is the first of the best logits."""

    def load(self) -> None:
        llama_cpp.llama_backend_init()
        self.quiet = llama_cpp.llama_log_callback(lambda level, text, data: None)
        llama_cpp.llama_log_set(self.quiet, ctypes.c_void_p())
        params = llama_cpp.llama_model_default_params()
        params.load_mode = llama_cpp.LLAMA_LOAD_MODE_MMAP
        params.use_extra_bufts = bool(self.job.get("repack", True))
        params.n_gpu_layers = 0
        self.model = llama_cpp.llama_model_load_from_file(self.job["path"].encode(), params)
        if not self.model:
            raise RuntimeError("llama.cpp could not load the model")
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx = self.job["context"]
        settings.n_batch = settings.n_ubatch = 512
        settings.n_threads = settings.n_threads_batch = self.job["threads"]
        self.context = llama_cpp.llama_init_from_model(self.model, settings)
        if not self.context:
            raise RuntimeError("llama.cpp could not make a context")
        vocab = llama_cpp.llama_model_get_vocab(self.model)
        self.size = llama_cpp.llama_vocab_n_tokens(vocab)

    def prompt(self, tokens: Sequence[int]) -> int:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), True)
        return self._decode(tokens)

    def step(self, token: int) -> int:
        return self._decode([token])

    def _decode(self, tokens: Sequence[int]) -> int:
        """Feed tokens, return the most likely next one; without positions llama.cpp counts on."""
        array = (llama_cpp.llama_token * len(tokens))(*tokens)
        failed = llama_cpp.llama_decode(
            self.context, llama_cpp.llama_batch_get_one(array, len(tokens))
        )
        if failed:
            raise RuntimeError(f"llama_decode ended with {failed}")
        logits = llama_cpp.llama_get_logits_ith(self.context, -1)
        return int(np.ctypeslib.as_array(logits, (self.size,)).argmax())

    def facts(self) -> dict[str, Any]:
        """Versions, and the bytes of the file that a token has to pass through."""
        fields = gguf.GGUFReader(self.job["path"])
        kind = fields.fields["general.architecture"].contents()
        experts = int(fields.fields[f"{kind}.expert_count"].contents())
        used = int(fields.fields[f"{kind}.expert_used_count"].contents())
        dense = sum(
            int(tensor.n_bytes)
            for tensor in fields.tensors
            if "_exps." not in tensor.name and tensor.name != "token_embd.weight"
        )
        routed = sum(int(tensor.n_bytes) for tensor in fields.tensors if "_exps." in tensor.name)
        return {
            "dense_token_bytes": dense,
            "routed_token_bytes": routed * used // experts,
            "llama_cpp": llama_cpp.__version__,
            "system_info": llama_cpp.llama_print_system_info().decode(),
        }


if __name__ == "__main__":
    main(LlamaArm)
