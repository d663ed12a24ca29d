"""Opens a package for a server: the model inside its budget, and what requests need beside it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from conmoe_edge.integrations.load import load_package
from conmoe_edge.integrations.package_needs import PackageNeeds, package_needs
from conmoe_edge.memory.budget import Budget
from conmoe_edge.model.tokenizers import load_tokenizer
from conmoe_edge.offload.generation.grammar import GrammarMaker
from conmoe_edge.offload.generation.named_templates import choose_template
from conmoe_edge.offload.generation.prompt_files import PromptFiles
from conmoe_edge.plan.requests import request_sizes
from conmoe_edge.serve.fewest_tokens import FewestTokens, fewest_tokens
from conmoe_edge.serve.jobs import Loaded
from conmoe_edge.serve.loading import Loading


class PackageLoader:
    """Opens one package, once."""

    def __init__(self, loading: Loading, *, tell: Callable[[str], None] | None = None) -> None:
        """``tell`` as of ``PromptFiles``."""
        self._loading = loading
        self._tell = tell
        self._text: tuple[Any, FewestTokens] | None = None

    def needs(self, budget: Budget) -> PackageNeeds:
        """What it takes of ``budget``; reads no weights.

        Raises:
            ConmoeError: it cannot be opened.
        """
        loading = self._loading
        return package_needs(
            loading.folder,
            budget,
            context=loading.context,
            kv_precision=loading.kv_precision,
            beside=self._beside,
        )

    def load(self, progress: Callable[[int, int], None], budget: Budget | None = None) -> Loaded:
        """Open it, in ``budget`` where that is given. ``progress`` as of ``load_package``.

        Raises:
            ConmoeError: it cannot be loaded.
        """
        loading = self._loading
        tokenizer, fewest = self._tokenizer()
        model: Any = load_package(
            loading.folder,
            budget=budget or loading.budget,
            device=loading.device,
            context=loading.context,
            cache_policy=loading.cache_policy,
            misses=loading.misses,
            beside=self._beside,
            progress=progress,
            kv_precision=loading.kv_precision,
        )
        files = None
        if loading.prompt_cache is not None:
            files = PromptFiles.of_model(
                model,
                loading.prompt_cache,
                most_bytes=loading.prompt_cache_bytes,
                tell=self._tell,
            )
        return Loaded(model, tokenizer, fewest, files, GrammarMaker.of_model(model, tokenizer))

    def _tokenizer(self) -> tuple[Any, FewestTokens]:
        if self._text is None:
            tokenizer = load_tokenizer(self._loading.folder)
            if self._loading.template is not None:
                choose_template(tokenizer, self._loading.template)
            fewest = fewest_tokens(tokenizer)
            tokenizer("")  # its first call writes to what all threads share
            self._text = tokenizer, fewest
        return self._text

    def _beside(self, budget_bytes: int, tokens: int) -> int:
        _, fewest = self._tokenizer()
        return request_sizes(budget_bytes, tokens, fewest.longest).nbytes
