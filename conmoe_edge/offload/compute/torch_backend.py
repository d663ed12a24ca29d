"""How an expert's products are computed: a fixed rule, and the paths it chooses from.

The rule looks at the processor, the stored form and how many tokens an expert got, never at memory, cache state or a
stopwatch, so the same package gives the same tokens at every budget on one machine. (A prompt that is cut into chunks
of another length gives every expert other numbers of tokens, and the sums may then differ in their last bit, as with
any program.)

=====================================  ==============================================================================
few rows on a CPU                      the compiled operator (``native``): every stored form, read once; beside weights
                                       in 8 and 4 bits the activations are rounded to 8
the same without a compiler            torch's own kernels for 8 and 4 bits where they take the form, else as below
a prompt on a CPU, quantised           the operator: weights expanded to bytes, a part at a time, once for all tokens,
                                       and multiplied in whole numbers with activations in 8 bits (``add_all``); of
                                       an expert with few tokens as few rows
other many rows on a CPU without bf16  one weight matrix at a time widened to fp32 in a scratch, fp32 products
instructions, quantised many rows
low rank and a few columns             the factors one after the other, by the operator or by torch as above
everything else                        torch's products in the format of the hidden states
=====================================  ==============================================================================

Why: for few rows time is the bytes of the weights over the memory's bandwidth; for many rows it is arithmetic, and on
processors without bf16 instructions bf16 products run at a fraction of the speed of fp32.

Memory: ``Scratch``, one weight matrix in fp32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate

import torch
from torch import Tensor, nn
from transformers.activations import SiLUActivation

from conmoe_edge import compat
from conmoe_edge.checkpoint.format.factored import factors_of
from conmoe_edge.checkpoint.format.forms import COLUMNS, DOWN, KEPT, LEFT, RIGHT, SCALE, TILES
from conmoe_edge.checkpoint.format.quantise import Matrix
from conmoe_edge.checkpoint.format.records import matrix_of
from conmoe_edge.model.experts import (
    expert_forward,
    plain_products,
    sum_dtype,
    through_expert,
)
from conmoe_edge.model.source_digest import source_digest
from conmoe_edge.offload.compute.steady_rows import padded
from conmoe_edge.offload.kernels.cpu.bindings import ExpertGate, operator, takes_many
from conmoe_edge.offload.storage.stored_expert import StoredExpert

MANY_ROWS = 16
"""From this many tokens on an expert's products are arithmetic; below, they are reading."""

EXPANDED = (torch.float32, torch.bfloat16)
"""Formats that the operator expands quantised weights to."""

# torch's elementwise operations take two vectors at a time and what is left one by one, with functions that differ in
# the last bit, and share work among threads from a certain size on.
_WHOLE_VECTORS = 64
_ONE_THREAD = 32768


@dataclass(frozen=True, slots=True)
class Machine:
    """What the rule may look at."""

    device: str
    native_bf16: bool

    @classmethod
    def here(cls, device: torch.device) -> Machine:
        """The machine that runs."""
        if device.type != "cpu":
            return cls(device.type, True)
        return cls("cpu", compat.native_bf16())


def compute_dtype(
    machine: Machine, hidden: torch.dtype, weight: torch.dtype, rows: int
) -> torch.dtype:
    """The format of torch's products for ``rows`` tokens in ``hidden`` and plain weights in ``weight``."""
    if hidden == torch.float64:
        return torch.float64
    if machine.device != "cpu":
        return hidden
    if torch.float32 in (hidden, weight):
        return torch.float32
    if not machine.native_bf16 and rows >= MANY_ROWS:
        return torch.float32
    return hidden


class Scratch:
    """One weight matrix in another format, in memory that is used again for the next one.

    Peak memory: the largest matrix that was asked for, in the widest format; allocated with the first use.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._memory = torch.empty(0, dtype=torch.uint8, device=device)

    def matrix(self, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
        """Room for [rows, columns] in ``dtype``; what it held before is gone."""
        nbytes = rows * columns * dtype.itemsize
        if self._memory.numel() < nbytes:
            # Written to again later, in whatever mode the caller is then.
            with torch.inference_mode(False):
                self._memory = torch.empty(0, dtype=torch.uint8, device=self._device)  # never two
                self._memory = torch.empty(nbytes, dtype=torch.uint8, device=self._device)
        return self._memory[:nbytes].view(dtype).view(rows, columns)


Routed = tuple[Tensor, Tensor]
"""Rows of a prompt that an expert gets, and their weights."""

Way = Callable[[nn.Module, Sequence[StoredExpert], Tensor], Tensor]
"""Some experts of a module on one token: [1, H] -> [n, H]."""


class Arithmetic:
    """Experts applied to tokens on one device."""

    def __init__(self, device: torch.device) -> None:
        self.machine = Machine.here(device)
        self.scratch = Scratch(device)
        self._operator = operator() if device.type == "cpu" else None

    @property
    def name(self) -> str:
        """What computes few rows, for reports."""
        if self._operator is not None:
            return self._operator.name
        return "torch" if self.machine.device == "cpu" else f"torch, {self.machine.device}"

    def one_token(
        self, module: nn.Module, experts: Sequence[StoredExpert], hidden: Tensor
    ) -> Tensor:
        """Several experts applied to one token.

        Args:
            module: the experts module.
            experts: n of them.
            hidden: [1, H].

        Returns:
            [n, H] in fp32 (fp64 for activations in fp64); each row is the same bits in any company.
        """
        known = expert_gate(module) is not None
        groups: dict[tuple[Way, object], list[int]] = {}
        for position, one in enumerate(experts):  # by what each is, never by its company
            if not one.suits_operator(module, hidden.dtype):
                key = (self._alone, position)
            elif known and one.matrices is not None:
                key = (self._gated, one.kin)
            else:
                alike = _gates_together(module, one, len(experts))
                key = (self._ungated, one.forms if alike else position)
            groups.setdefault(key, []).append(position)
        if len(groups) == 1:
            ((way, _),) = groups
            return way(module, experts, hidden)
        out = torch.empty(len(experts), hidden.shape[1], dtype=sum_dtype(hidden))
        for (way, _), positions in groups.items():
            out[positions] = way(module, [experts[at] for at in positions], hidden)
        return out

    def several_tokens(
        self,
        module: nn.Module,
        experts: Sequence[StoredExpert],
        hidden: Tensor,
        asking: Sequence[Sequence[int]],
    ) -> list[Tensor]:
        """Experts that one call takes (``gates_in_one_call``), each applied to those rows of ``hidden`` [T, H] that ask
        for it: for each [n, H], with the bits of ``one_token``. Each expert's weights are read once.
        """
        engine, gate = self._operator, expert_gate(module)
        assert engine is not None and gate is not None, "gates_in_one_call has looked"
        kins: dict[object, list[int]] = {}
        for position, one in enumerate(experts):
            kins.setdefault(one.kin, []).append(position)
        found: list[Tensor] = [hidden] * len(experts)
        x = hidden.contiguous()
        for positions in kins.values():
            some = [experts[position] for position in positions]
            ups, downs = zip(*[one.matrices for one in some if one.matrices], strict=True)
            biases = [one.biases for one in some if one.biases is not None]
            mine = [asking[position] for position in positions]
            rows = engine.gated_together(ups, downs, x, mine, gate, biases or None)
            for position, part in zip(
                positions, rows.split([len(one) for one in mine]), strict=True
            ):
                found[position] = part
        return found

    def rows(self, module: nn.Module, expert: StoredExpert, hidden: Tensor) -> Tensor:
        """One expert applied to its tokens: [n, H] -> [n, H] in the format of the sums."""
        if len(hidden) < MANY_ROWS and expert.suits_operator(module, hidden.dtype):
            return self._by_operator(module, [expert], hidden.float().unsqueeze(0))[0]
        compute = self._quantised if expert.quantised else self._plain
        if expert.factored:
            compute = self._factored
        return compute(module, expert, padded(hidden))[: len(hidden)].to(sum_dtype(hidden))

    def add_all(
        self,
        module: nn.Module,
        experts: Sequence[StoredExpert],
        hidden: Tensor,
        routed: Sequence[Routed],
        total: Tensor,
    ) -> None:
        """Add what several experts make of the tokens of a prompt to ``total``, in their order.

        One call for all of them or several give the same bits.

        Args:
            module: the experts module.
            experts: n of them.
            hidden: [T, H], ``MANY_ROWS`` tokens or more.
            routed: the rows [m] of ``hidden`` that each gets, int64 and distinct, and their weights, fp32 [m].
            total: [T, H] in the format of the sums.
        """
        known = expert_gate(module) is not None and total.dtype == torch.float32
        start = 0
        while start < len(experts):
            kin = _prompt_kin(module, experts[start], hidden.dtype) if known else None
            stop = start + 1
            if kin is None:
                rows, weights = routed[start]
                out = self.rows(module, experts[start], hidden[rows]) * weights.unsqueeze(1)
                total.index_add_(0, rows, out)  # a prototype sees a token once
            else:
                while stop < len(experts) and kin == _prompt_kin(
                    module, experts[stop], hidden.dtype
                ):
                    stop += 1
                self._many(module, experts[start:stop], hidden, routed[start:stop], total)
            start = stop

    def combine(
        self,
        out: Tensor,
        weights: Sequence[float],
        dtype: torch.dtype,
        constants: Sequence[tuple[Tensor, float]] = (),
    ) -> Tensor:
        """sum over i of weights[i] * out[i], then of the constants' weights times them: [n, H] of ``one_token``,
        constants [H] -> [1, H] in ``dtype``.
        """
        engine, kept = self._operator, (torch.float32, torch.bfloat16)
        if engine is not None and out.dtype == torch.float32 and dtype in kept:
            return engine.combine(out, weights, dtype, constants)
        alpha = torch.tensor(weights, dtype=out.dtype, device=out.device).unsqueeze(1)
        total = (out * alpha).sum(0, keepdim=True)
        for row, weight in constants:
            total += row * weight
        return total.to(dtype)

    def _alone(self, module: nn.Module, experts: Sequence[StoredExpert], hidden: Tensor) -> Tensor:
        """One expert without the operator."""
        return self.rows(module, experts[0], hidden)

    def _gated(self, module: nn.Module, experts: Sequence[StoredExpert], hidden: Tensor) -> Tensor:
        """[1, H] -> fp32 [n, H]: whole experts in one call."""
        engine = self._operator
        assert engine is not None, "stored experts suit the operator only where there is one"
        x = hidden if hidden.dtype != torch.float16 else hidden.float()
        matrices = [one.matrices for one in experts if one.matrices is not None]
        ups, downs = zip(*matrices, strict=True)
        biases = [one.biases for one in experts if one.biases is not None]
        gate = expert_gate(module)
        assert gate is not None, "one_token has looked"
        return engine.gated_experts(ups, downs, x.contiguous(), gate, biases or None)

    def _many(
        self,
        module: nn.Module,
        experts: Sequence[StoredExpert],
        hidden: Tensor,
        routed: Sequence[Routed],
        total: Tensor,
    ) -> None:
        """``add_all`` for experts of one kin by the operator."""
        engine, gate = self._operator, expert_gate(module)
        assert engine is not None and gate is not None, "add_all has looked"
        matrices = [one.matrices for one in experts if one.matrices is not None]
        ups, downs = zip(*matrices, strict=True)
        biases = [one.biases for one in experts if one.biases is not None]
        x = hidden if hidden.dtype != torch.float16 else hidden.float()
        starts = [0, *accumulate(len(rows) for rows, _ in routed)]
        rows, weights = (torch.cat(side) for side in zip(*routed, strict=True))
        engine.many_experts(
            ups, downs, x.contiguous(), (starts, rows, weights), total, gate, biases or None
        )

    def _ungated(
        self, module: nn.Module, experts: Sequence[StoredExpert], hidden: Tensor
    ) -> Tensor:
        """The same with the gate in torch."""
        return self._by_operator(module, experts, hidden.float().unsqueeze(0))[:, 0]

    def _by_operator(
        self, module: nn.Module, experts: Sequence[StoredExpert], hidden: Tensor
    ) -> Tensor:
        """fp32 [1, t, H] -> fp32 [n, t, H], one pass over the weights of all n."""
        engine = self._operator
        assert engine is not None, "stored experts suit the operator only where there is one"

        def times(name: str, x: Tensor) -> Tensor:
            return engine.few_rows([one.prepared[name] for one in experts], x.contiguous())

        def project(name: str, x: Tensor) -> Tensor:
            if experts[0].factored:
                y = times(name + LEFT, times(name + RIGHT, x))
                y += times(name + KEPT, _kept_inputs(experts, name, x))
            else:
                y = times(name, x)
            bias = f"{name}_bias"
            if bias in experts[0].parts:
                y += torch.stack([one.parts[bias] for one in experts]).unsqueeze(1)
            return y

        return through_expert(module, hidden, project)

    def _factored(self, module: nn.Module, expert: StoredExpert, hidden: Tensor) -> Tensor:
        """Low rank and a few columns, without expanding them; the factors are small enough to convert each time."""
        weight = expert.parts[DOWN + LEFT].dtype
        dtype = compute_dtype(self.machine, hidden.dtype, weight, len(hidden))

        def project(name: str, x: Tensor) -> Tensor:
            y = factors_of(expert.parts, name).product(x)
            bias = expert.parts.get(f"{name}_bias")
            return y if bias is None else y + bias.to(dtype)

        return through_expert(module, hidden.to(dtype), project)

    def _plain(self, module: nn.Module, expert: StoredExpert, hidden: Tensor) -> Tensor:
        weight = next(iter(expert.parts.values())).dtype
        dtype = compute_dtype(self.machine, hidden.dtype, weight, len(hidden))
        if dtype == weight or expert.forms is None or module.is_transposed:
            return expert_forward(module, hidden, expert.parts, dtype)
        return self._widened(module, expert, hidden, dtype)

    def _quantised(self, module: nn.Module, expert: StoredExpert, hidden: Tensor) -> Tensor:
        few = len(hidden) < MANY_ROWS and self.machine.device == "cpu"
        if few and all(_torch_takes(matrix_of(expert.parts, name)) for name in _weights(expert)):
            return self._by_torch(module, expert, hidden)
        on_cpu = self.machine.device == "cpu" and not self.machine.native_bf16
        wide = torch.float32 if on_cpu and hidden.dtype != torch.float64 else hidden.dtype
        return self._widened(module, expert, hidden, wide)

    def _widened(
        self, module: nn.Module, expert: StoredExpert, hidden: Tensor, dtype: torch.dtype
    ) -> Tensor:
        """Products in ``dtype`` with one weight matrix at a time expanded into the scratch."""

        def project(name: str, x: Tensor) -> Tensor:
            if module.is_transposed and name + SCALE not in expert.parts:
                return plain_products(module, expert.parts, dtype)(name, x)
            matrix = matrix_of(expert.parts, name)
            weight = self.scratch.matrix(matrix.rows, matrix.columns, dtype)
            prepared = dtype in EXPANDED and name in expert.prepared
            if self._operator is not None and prepared:
                self._operator.expand(expert.prepared[name], weight)
            else:
                matrix.dequantise(out=weight)
            bias = expert.parts.get(f"{name}_bias")
            return nn.functional.linear(x, weight, None if bias is None else bias.to(dtype))

        return through_expert(module, hidden.to(dtype), project)

    def _by_torch(self, module: nn.Module, expert: StoredExpert, hidden: Tensor) -> Tensor:
        """torch's own kernels for few rows of 8-bit and 4-bit weights, which work in bf16."""

        def project(name: str, x: Tensor) -> Tensor:
            matrix = matrix_of(expert.parts, name)
            # ``_torch_takes`` has looked whether there is a kernel.
            if matrix.kind == "int8":
                y = compat.INT8_PRODUCT(x, matrix.values, matrix.scales)  # pyright: ignore[reportOptionalCall]
            else:
                y = compat.INT4_PRODUCT(x, matrix.values, matrix.group, matrix.scales)  # pyright: ignore[reportOptionalCall]
            bias = expert.parts.get(f"{name}_bias")
            return y if bias is None else y + bias.to(y.dtype)

        return through_expert(module, hidden.bfloat16(), project)


def gates_in_one_call(
    module: nn.Module, experts: Sequence[StoredExpert], hidden: torch.dtype
) -> bool:
    """Whether the operator computes all these experts of ``module`` together, for activations in ``hidden``."""
    suited = all(one.suits_operator(module, hidden) and one.matrices is not None for one in experts)
    return bool(experts) and suited and expert_gate(module) is not None


_SILU = ExpertGate()
_GPT_OSS = "transformers.models.gpt_oss.modeling_gpt_oss.GptOssExperts"
_GPT_OSS_DIGESTS = ("51f0c8e1449251a2",)


def expert_gate(module: nn.Module) -> ExpertGate | None:
    """The gate of the experts ``module`` for the operator; ``None`` for one that it does not compute."""
    if usual_gate(module):
        return _SILU
    if not _is_gpt_oss(type(module)) or "_apply_gate" in vars(module):
        return None
    return ExpertGate(float(module.alpha), float(module.limit), interleaved=True)  # pyright: ignore[reportArgumentType]


@cache
def _is_gpt_oss(kind: type) -> bool:
    """Whether ``kind`` is gpt_oss's, with the code that was looked at (``model/source_digest.py``)."""
    if f"{kind.__module__}.{kind.__qualname__}" != _GPT_OSS:
        return False
    try:
        return source_digest(kind) in _GPT_OSS_DIGESTS
    except OSError:
        return False


def usual_gate(module: nn.Module) -> bool:
    """silu(gate) * up, gate before up, and nothing around it: what the operator computes itself."""
    function = getattr(type(module), "_apply_gate", None)
    usual = getattr(function, "__name__", "") == "_default_apply_gate"
    function = getattr(module, "act_fn", None)
    silu = function is nn.functional.silu or isinstance(function, (nn.SiLU, SiLUActivation))
    return usual and silu and bool(module.has_gate) and not module.has_post_expert_norm


def _prompt_kin(
    module: nn.Module, expert: StoredExpert, hidden: torch.dtype
) -> tuple[int, ...] | None:
    """What experts have in common that the operator takes together for a prompt; ``None`` for one that it does not
    take so."""
    suits = expert.matrices is not None and expert.suits_operator(module, hidden)
    return (
        expert.kin if suits and all(takes_many(one.form) for one in expert.matrices or ()) else None
    )


def _gates_together(module: nn.Module, expert: StoredExpert, experts: int) -> bool:
    """Whether the gates of several experts, computed in one call, are the same bits as one by one."""
    down = expert.prepared[DOWN + RIGHT if expert.factored else DOWN]
    width = down.form.columns
    whole = width % _WHOLE_VECTORS == 0 and experts * width <= _ONE_THREAD
    return whole and not module.has_post_expert_norm


def _kept_inputs(experts: Sequence[StoredExpert], name: str, x: Tensor) -> Tensor:
    """What the kept columns of each expert are multiplied with: [1 or n, t, C] -> [n, t, k]."""
    every = x.expand(len(experts), *x.shape[1:])
    return torch.stack(
        [
            one.index_select(-1, expert.parts[name + COLUMNS])
            for one, expert in zip(every, experts, strict=True)
        ]
    )


def _weights(expert: StoredExpert) -> list[str]:
    return [name for name in expert.parts if not name.endswith((SCALE, "_bias"))]


def _torch_takes(matrix: Matrix) -> bool:
    """Whether torch has a CPU kernel that reads this form as it is."""
    if matrix.kind == "int8":
        return compat.INT8_PRODUCT is not None
    wide = torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    whole = matrix.kind == "int4" and matrix.rows % TILES[0] == 0
    return whole and wide and compat.INT4_PRODUCT is not None
