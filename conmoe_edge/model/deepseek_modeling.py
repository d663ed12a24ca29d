"""DeepSeek V1 out of transformers' own parts: Llama's attention and dense layers, DeepSeek V2's
experts, OLMoE's router.

The architecture (arXiv 2401.06066, section 3): Llama with, in all but the first layers, a softmax router that takes the
top-k without renormalising them, routed experts, and shared experts that every token passes.
"""

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Experts, DeepseekV2MLP
from transformers.models.llama.modeling_llama import (
    LlamaForCausalLM,
    LlamaModel,
    LlamaPreTrainedModel,
)
from transformers.models.olmoe.modeling_olmoe import OlmoeTopKRouter

from conmoe_edge.model.deepseek import DeepseekConfig


class DeepseekMoe(nn.Module):
    """Routed experts plus shared experts. [B, T, H] -> [B, T, H]."""

    def __init__(self, config: DeepseekConfig) -> None:
        super().__init__()
        self.gate = OlmoeTopKRouter(config)
        self.experts = DeepseekV2Experts(config)
        self.shared_experts = (
            DeepseekV2MLP(
                config,  # pyright: ignore[reportArgumentType]  # it has all the fields that the class reads
                intermediate_size=config.moe_intermediate_size * config.n_shared_experts,
            )
            if config.n_shared_experts
            else None
        )

    def forward(self, hidden_states: Tensor) -> Tensor:
        flat = hidden_states.reshape(-1, hidden_states.shape[-1])  # [B * T, H]
        _, weights, index = self.gate(flat)
        out = self.experts(flat, index, weights).view_as(hidden_states)
        if self.shared_experts is not None:
            out = out + self.shared_experts(hidden_states)
        return out


class DeepseekPreTrainedModel(LlamaPreTrainedModel):
    """Initialisation of what Llama does not have."""

    config: DeepseekConfig
    _can_record_outputs = LlamaPreTrainedModel._can_record_outputs

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, OlmoeTopKRouter):
            init.normal_(module.weight, mean=0.0, std=self.config.initializer_range)
        elif isinstance(module, DeepseekV2Experts):
            for weight in module.parameters(recurse=False):
                init.normal_(weight, mean=0.0, std=self.config.initializer_range)


class DeepseekModel(DeepseekPreTrainedModel, LlamaModel):
    """Llama's decoder with mixture-of-experts blocks where the config says so."""

    def __init__(self, config: DeepseekConfig) -> None:
        super().__init__(config)
        for index, layer in enumerate(self.layers):
            if config.is_moe_layer(index):
                layer.mlp = DeepseekMoe(config)
        self.post_init()


class DeepseekForCausalLM(DeepseekPreTrainedModel, LlamaForCausalLM):
    """The causal language model."""

    def __init__(self, config: DeepseekConfig) -> None:
        # Past Llama's own constructor, which would build a Llama decoder first.
        super(LlamaForCausalLM, self).__init__(config)
        self.model = DeepseekModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()
