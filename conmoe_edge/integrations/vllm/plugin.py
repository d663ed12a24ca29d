"""vLLM's two classes: the quantization config ``conmoe`` and the method that holds and runs a layer's prototypes.

``PrototypesMethod`` takes the place of vLLM's method for unquantized experts. It makes the stacked weights for the
prototypes of a layer instead of for its router slots, reads them from the package, and maps what the router chose
before the kernel sees it: slot -> position in the stack, gate -> gate * scale; two slots of a token that lead to one
prototype are two rows of the kernel's input, whose outputs add up. Constants are added behind the kernel. The router
keeps its outputs, so every way of routing that vLLM has goes on working.

Memory of a rank: its share of the prototypes in the model's number format, and the tables. Raises ``NotServable``
where vLLM is started in a way that this cannot serve.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import get_current_vllm_config  # pyright: ignore[reportMissingImports]
from vllm.model_executor.layers.fused_moe import (  # pyright: ignore[reportMissingImports]
    RoutedExperts,
)
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import (  # pyright: ignore[reportMissingImports]
    UnquantizedFusedMoEMethod,
)
from vllm.model_executor.layers.linear import (  # pyright: ignore[reportMissingImports]
    LinearBase,
    UnquantizedLinearMethod,
)
from vllm.model_executor.layers.quantization import (  # pyright: ignore[reportMissingImports]
    register_quantization_config,
)
from vllm.model_executor.layers.quantization.base_config import (  # pyright: ignore[reportMissingImports]
    QuantizationConfig,
    QuantizeMethodBase,
)
from vllm.model_executor.layers.vocab_parallel_embedding import (  # pyright: ignore[reportMissingImports]
    UnquantizedEmbeddingMethod,
    VocabParallelEmbedding,
)
from vllm.model_executor.models.utils import (  # pyright: ignore[reportMissingImports]
    extract_layer_index,
)
from vllm.platforms import current_platform  # pyright: ignore[reportMissingImports]

from conmoe_edge.integrations.vllm.layer_stacks import LayerStack, NotServable, share_of
from conmoe_edge.integrations.vllm.stacked_weights import (
    Package,
    RankSlots,
    fill,
    gated_sum,
    map_choice,
    open_package,
    package_folder,
    padded_constants,
)

QUANT_METHOD = "conmoe"


def register_quantization() -> None:
    """Put ``conmoe`` into vLLM's table of quantization methods."""
    register_quantization_config(QUANT_METHOD)(PrototypesConfig)


class PrototypesConfig(QuantizationConfig):
    """``quantization_config`` of a package's ``config.json``. All else is in the package, which is opened where the
    weights are made; this object travels to every worker.
    """

    def __init__(self) -> None:
        super().__init__()
        self._folder: Path | None = None

    def get_name(self) -> str:
        """The method's name in ``config.json``."""
        return QUANT_METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """What the kernels for unquantized experts compute in."""
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        """Nothing beyond what vLLM itself asks for."""
        return 0

    @staticmethod
    def get_config_filenames() -> list[str]:
        """None: a package says everything in ``config.json`` and ``conmoe.json``."""
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> PrototypesConfig:
        """What ``config.json`` holds is checked with the manifest."""
        return cls()

    def maybe_update_config(
        self, model_name: str, hf_config: Any = None, revision: str | None = None
    ) -> None:
        """Find the package, and refuse what cannot be served before any worker is started."""
        self._folder = package_folder(model_name)

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """Prototypes for routed experts, the model's own weights for everything else."""
        if isinstance(layer, RoutedExperts):
            if self.online_quantization_config is not None:
                raise NotServable(
                    "Prototypes are not quantised again while they are loaded.",
                    "vLLM was asked to quantise a package",
                    "no --quantization; conmoe-edge fit MODEL --precision int8 makes the package smaller",
                )
            assert self._folder is not None
            package = open_package(self._folder)
            index = extract_layer_index(prefix)
            if index not in package.stacks:
                raise NotServable(
                    f"The package has no prototypes for layer {index}.",
                    "experts of a draft head are no part of a package",
                    "start vLLM without speculative decoding by the model's own head",
                )
            return PrototypesMethod(layer.moe_config, layer, package, package.stacks[index])
        if isinstance(layer, LinearBase):
            return _LoadedLinear(prefix)
        if isinstance(layer, VocabParallelEmbedding):
            return _LoadedEmbedding(prefix)
        return None


class _LoadedLinear(UnquantizedLinearMethod):
    """vLLM's own, with a look at whether the weight came. vLLM looks itself, but not where a quantization is named."""

    def __init__(self, prefix: str) -> None:
        super().__init__()
        self._prefix = prefix

    def create_weights(self, layer: nn.Module, *args: Any, **kwargs: Any) -> None:
        """As the base class, all NaN."""
        super().create_weights(layer, *args, **kwargs)
        _mark(layer)

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """As the base class, once the weight is there."""
        _check_came(layer, self._prefix)
        super().process_weights_after_loading(layer)


class _LoadedEmbedding(UnquantizedEmbeddingMethod):
    """The same for embeddings and heads."""

    def __init__(self, prefix: str) -> None:
        super().__init__()
        self._prefix = prefix

    def create_weights(self, layer: nn.Module, *args: Any, **kwargs: Any) -> None:
        """As the base class, all NaN."""
        super().create_weights(layer, *args, **kwargs)
        _mark(layer)

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """As the base class, once the weight is there."""
        _check_came(layer, self._prefix)
        super().process_weights_after_loading(layer)


def _mark(layer: Any) -> None:
    layer.weight.data.fill_(torch.nan)


def _check_came(layer: Any, prefix: str) -> None:
    if bool(layer.weight[:, 0].isnan().any()):
        raise NotServable(
            f"vLLM found no weight for {prefix}.",
            "its class for this model expects one that the checkpoint does not have, such as a head of its own "
            "where the head is the embedding",
            "vllm serve DIR --model-impl transformers",
        )


class PrototypesMethod(UnquantizedFusedMoEMethod):
    """A layer's prototypes in place of one expert a router slot."""

    def __init__(self, moe: Any, layer: Any, package: Package, stack: LayerStack) -> None:
        _check_layer(moe, layer)
        if not current_platform.is_cpu():
            # Reads the number of experts off the weights, and never routes by itself.
            moe.moe_backend = "triton"
        super().__init__(moe)
        self._package = package
        self._stack = stack
        self._parallel = moe.moe_parallel_config
        self._held = share_of(stack.stack, self._parallel.ep_rank, self._parallel.ep_size)
        if not self._held:
            raise NotServable(
                f"Layer {stack.layer} has {len(stack.stack)} prototypes for {self._parallel.ep_size} ranks.",
                "vLLM's kernels want at least one expert on every rank",
                "start vLLM without --enable-expert-parallel",
            )

    def holds(self, stack: LayerStack) -> bool:
        """Whether this layer has the weights of ``stack``."""
        return self._holder and self._stack.leader == stack.leader

    @property
    def supports_eplb(self) -> bool:
        """No: its tables are those of router slots."""
        return False

    def maybe_roundup_sizes(
        self, hidden_size: int, intermediate_size_per_partition: int, *rest: Any
    ) -> tuple[int, int]:
        """Prototypes may have fewer neurons than the model's experts."""
        part = -(-self._stack.width // self._parallel.tp_size)
        return super().maybe_roundup_sizes(hidden_size, part, *rest)

    def create_weights(
        self,
        layer: Any,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Room for this rank's prototypes, whatever ``num_experts`` says; none where another layer of the scope has
        them already.
        """
        found = _holder_of(self._stack)
        self._holder = found is None
        self._shared = [found]  # in a list: it is no submodule of this
        held = len(self._held) if self._holder else 0
        wide = intermediate_size_per_partition
        for name, shape in (
            ("w13_weight", (held, 2 * wide, hidden_size)),
            ("w2_weight", (held, hidden_size, wide)),
        ):
            weight = nn.Parameter(torch.empty(shape, dtype=params_dtype), requires_grad=False)
            layer.register_parameter(name, weight)
        self._tables(layer)

    def _tables(self, layer: Any) -> None:
        """Buffers that map the router's choice; the last row of the constants is zero."""
        slots = self._stack.slots
        rank = RankSlots.of(slots, self._held)
        layer.register_buffer("conmoe_target", rank.target, persistent=False)
        layer.register_buffer("conmoe_scale", rank.factor, persistent=False)
        self._weighs = rank.weighs
        # Ranks are added up behind this, so one of them brings the constants.
        self._adds = (
            slots.has_constants and self._parallel.tp_rank == 0 and self._parallel.ep_rank == 0
        )
        if self._adds:
            rows = self._package.constants(slots.layer)
            assert rows is not None
            padded, row_of = padded_constants(slots, rows)
            layer.register_buffer(
                "conmoe_constants", padded.to(layer.conmoe_scale.device), persistent=False
            )
            layer.register_buffer("conmoe_constant_of", row_of, persistent=False)

    def process_weights_after_loading(self, layer: Any) -> None:
        """Read the prototypes, and bring them into the kernel's form; or take both from the scope's first layer."""
        if not self._holder:
            first = self._shared[0]
            layer.register_parameter("w13_weight", first.w13_weight)
            layer.register_parameter("w2_weight", first.w2_weight)
            self.moe_quant_config = first.quant_method.moe_quant_config
            self.moe_kernel = first.quant_method.moe_kernel
            return
        with torch.device("cpu"):  # where records are read to, whatever the default is
            fill(
                self._package,
                [self._stack.stack[place] for place in self._held],
                layer.w13_weight.data,
                layer.w2_weight.data,
                rank=self._parallel.tp_rank,
                ranks=self._parallel.tp_size,
                width=self._stack.width,
            )
        super().process_weights_after_loading(layer)

    def forward_native(
        self,
        layer: Any,
        x: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        shared_experts: Any,
        shared_experts_input: Tensor | None,
    ) -> Tensor:
        """[T, H], gates and slots [T, K] -> [T, H]."""
        assert self.moe_kernel is not None
        slots = topk_ids.long()
        factor = layer.conmoe_scale if self._weighs else None
        chosen, weights = map_choice(layer.conmoe_target, factor, slots, topk_weights)
        out = self.moe_kernel.apply(
            hidden_states=x,
            w1=layer.w13_weight,
            w2=layer.w2_weight,
            topk_weights=weights,
            topk_ids=chosen.to(topk_ids.dtype),
            activation=layer.activation,
            apply_router_weight_on_input=False,
            global_num_experts=len(self._held),
            expert_map=None,
            shared_experts=shared_experts,
            shared_experts_input=shared_experts_input,
        )
        if not self._adds:
            return out
        constants = gated_sum(layer.conmoe_constants, layer.conmoe_constant_of, slots, topk_weights)
        return out + constants.to(out.dtype)


def _holder_of(stack: LayerStack) -> Any:
    """The layer of the model that is being built which holds the same stack already, where there is one."""
    layers = get_current_vllm_config().compilation_config.static_forward_context
    for runner in layers.values():
        experts = getattr(runner, "routed_experts", None)
        method = getattr(experts, "quant_method", None)
        if isinstance(method, PrototypesMethod) and method.holds(stack):
            return experts
    return None


def _check_layer(moe: Any, layer: Any) -> None:
    """Refuse ways of running a layer in which the router's choice is not what arrives here."""
    parallel = moe.moe_parallel_config
    if parallel.use_ep and parallel.dp_size > 1:
        raise NotServable(
            "Expert parallelism over data-parallel ranks is not served from prototypes.",
            "tokens would be sent to ranks by their router slots, which are not where their prototypes are",
            "--enable-expert-parallel with --tensor-parallel-size alone, or several servers behind a balancer",
        )
    if parallel.is_sequence_parallel:
        raise NotServable(
            "Sequence-parallel experts are not served from prototypes.",
            "",
            "start vLLM with --data-parallel-size 1",
        )
    if moe.has_bias or not moe.is_act_and_mul:
        raise NotServable(
            "This model's experts have biases or no gate.",
            "prototypes are served as gate, up and down projections",
            "conmoe-edge export DIR --format hf, and serve that",
        )
    if layer.apply_router_weight_on_input:
        raise NotServable(
            "This model multiplies the input of an expert by its routing weight.",
            "weights that meet on one prototype could not be added up",
            "serve the original model with vLLM, without a package",
        )
    if moe.is_lora_enabled:
        raise NotServable(
            "Adapters are not served on prototypes.",
            "an adapter belongs to one expert, a prototype to several router slots",
            "start vLLM without --enable-lora",
        )
