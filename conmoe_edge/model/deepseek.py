"""DeepSeek V1 (``model_type: "deepseek"``, deepseek-moe-16b): its config, and registration with the Auto classes.

transformers has no class for this one. The hub repository carries its own code, which is never run
here; the model is built from transformers' parts instead (``deepseek_modeling.py``), under the same
tensor names. This file imports no model code, so that registering the config stays cheap.
"""

from __future__ import annotations

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers.models.llama.configuration_llama import LlamaConfig


@strict
class DeepseekConfig(LlamaConfig):
    """Fields beyond Llama's, with the values of deepseek-moe-16b-base as defaults (arXiv 2401.06066)."""

    model_type = "deepseek"
    attribute_map = {"num_experts": "n_routed_experts", "num_local_experts": "n_routed_experts"}  # noqa: RUF012
    base_model_tp_plan = None
    base_model_pp_plan = None

    vocab_size: int = 102400
    hidden_size: int = 2048
    intermediate_size: int = 10944
    moe_intermediate_size: int = 1408
    num_hidden_layers: int = 28
    num_attention_heads: int = 16
    n_shared_experts: int | None = 2
    n_routed_experts: int = 64
    num_experts_per_tok: int = 6
    moe_layer_freq: int = 1
    first_k_dense_replace: int = 1
    norm_topk_prob: bool = False
    max_position_embeddings: int = 4096
    bos_token_id: int | None = 100000
    eos_token_id: int | list[int] | None = 100001

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        # Every way to a model goes through an instance of its config. Registering the model any earlier would import
        # modelling code while transformers may itself be half imported.
        register_model()

    def is_moe_layer(self, index: int) -> bool:
        """Whether decoder layer ``index`` has routed experts."""
        return index >= self.first_k_dense_replace and index % self.moe_layer_freq == 0


def register_config() -> None:
    """Make ``AutoConfig`` know ``deepseek``; calling it again does nothing."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING, AutoConfig

    if "deepseek" not in CONFIG_MAPPING:
        AutoConfig.register("deepseek", DeepseekConfig)


def register_model() -> None:
    """Make ``AutoModelForCausalLM`` know ``deepseek``; calling it again does nothing."""
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        AutoModelForCausalLM,
    )

    register_config()
    if DeepseekConfig in MODEL_FOR_CAUSAL_LM_MAPPING:
        return
    from transformers.conversion_mapping import (
        get_checkpoint_conversion_mapping,
        register_checkpoint_conversion_mapping,
    )

    from conmoe_edge.model.deepseek_modeling import DeepseekForCausalLM

    # Per-expert names on the hub, fused weights in memory: the same mapping as DeepSeek V2 has.
    mapping = get_checkpoint_conversion_mapping("deepseek_v2")
    assert mapping is not None
    register_checkpoint_conversion_mapping("deepseek", mapping, overwrite=True)
    AutoModelForCausalLM.register(DeepseekConfig, DeepseekForCausalLM)
