"""``plan``: where a model is, what it looks like, what the machine gives, what would be done."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

from conmoe_edge.api.export_outlook import export_outlook
from conmoe_edge.checkpoint.sources.locate import Description, describe
from conmoe_edge.checkpoint.sources.source_scratch import Unit, unit_of
from conmoe_edge.checkpoint.tensors.fingerprint import fingerprint
from conmoe_edge.errors import CalibrationError, ConmoeError, UsageError
from conmoe_edge.memory.bandwidth import Meter, threads
from conmoe_edge.memory.garbage import no_collections
from conmoe_edge.memory.outcomes import Outcome, recall
from conmoe_edge.memory.resolve import resolve_budget
from conmoe_edge.model.anatomy import ModelAnatomy
from conmoe_edge.model.other_parts import NOTHING, OtherParts
from conmoe_edge.model.tokenizers import tried_tokenizer
from conmoe_edge.plan.advice import advise
from conmoe_edge.plan.fetching import Fetching, fetching_of
from conmoe_edge.plan.fit_memory import FitMemory, fit_memory
from conmoe_edge.plan.levers import FREE, shares_out
from conmoe_edge.plan.plan import Plan
from conmoe_edge.plan.planner import make_plan
from conmoe_edge.plan.prompt_speed import Arithmetic, PromptSpeed, planned_prompt
from conmoe_edge.plan.request import Levers, PlanRequest
from conmoe_edge.plan.scope_choice import scopes_to_try
from conmoe_edge.plan.serialise import plan_to_json
from conmoe_edge.plan.serving import request_for

if TYPE_CHECKING:
    from conmoe_edge.compress.methods.interface import Method


@dataclass(frozen=True, slots=True)
class PlanReport:
    """A plan and what it is for.

    Attributes:
        method: the consolidation method that the plan counts with.
        method_note: why it is that one, where the default gave way; else empty.
        tokenizer: whether the model has one that opens; ``None`` where nobody looked.
        tokenizer_fault: why it has none; else empty.
        tokenizer_fix: what helps then; else empty.
        beside: the model's parts for pictures and sound, empty for a text model.
        keeps_vision: whether the package has them.
        fetching: what comes from the hub and how much disk that takes; ``None`` where the weights are on this disk.
        outcomes: what earlier fits of this model on this machine cost, oldest first; none where prototypes have to be
            alike, for another engine say, as those fits say nothing about this one.
        scopes_tried: how many layers may share prototypes, where the fit measures it; empty where it does not.
        prompt: how long a prompt should take; ``None`` where rates of the target are not known.
        export_note: what cannot be had of the package in other engines; else empty.
        memory: what the fit itself takes of this machine's RAM; ``None`` where the model stays as it is.
    """

    source_name: str
    anatomy: ModelAnatomy
    plan: Plan
    method: str = "auto"
    method_note: str = ""
    tokenizer: bool | None = None
    tokenizer_fault: str = ""
    tokenizer_fix: str = ""
    beside: OtherParts = NOTHING
    keeps_vision: bool = False
    fetching: Fetching | None = None
    outcomes: tuple[Outcome, ...] = ()
    scopes_tried: tuple[int, ...] = ()
    prompt: PromptSpeed | None = None
    export_note: str = ""
    memory: FitMemory | None = None

    @property
    def advice(self) -> str:
        """What the outcomes say about the settings; empty where they say nothing better."""
        return advise(self.plan, self.outcomes, self.method)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON; sizes in bytes."""
        return {
            "schema_version": 1,
            "model": {
                "name": self.source_name,
                "model_type": self.anatomy.model_type,
                "architecture": self.anatomy.architecture,
                "dtype": self.anatomy.dtype,
                "layers": len(self.anatomy.layers),
                "moe_layers": len(self.anatomy.moe_layers),
                "experts": self.anatomy.expert_count,
                "total_bytes": self.anatomy.total_bytes,
                "dense_bytes": self.anatomy.dense_bytes,
                "experts_bytes": self.anatomy.experts_bytes,
            },
            "method": self.method,
            "method_note": self.method_note,
            "scopes_tried": list(self.scopes_tried),
            "tokenizer": self.tokenizer,
            "tokenizer_fault": self.tokenizer_fault,
            "tokenizer_fix": self.tokenizer_fix,
            "other_parts": self.beside.to_json(kept=self.keeps_vision),
            "export_note": self.export_note,
            "plan": plan_to_json(self.plan),
            "prompt": None
            if self.prompt is None
            else {**asdict(self.prompt), "tokens_per_second": self.prompt.tokens_per_second},
            "fetching": None if self.fetching is None else asdict(self.fetching),
            "fit_memory": None
            if self.memory is None
            else {**asdict(self.memory), "bytes": self.memory.nbytes},
            "measured": [asdict(one) for one in self.outcomes],
            "advise": self.advice,
        }


@no_collections()
def plan(
    model: str,
    request: PlanRequest | None = None,
    *,
    revision: str | None = None,
    offline: bool = False,
    keep_source: bool = False,
    passes: int | None = None,
    keep_vision: bool = False,
    **levers: Unpack[Levers],
) -> PlanReport:
    """What ``fit`` would do. Reads ``config.json`` and the headers of the weights, for a hub model without a download.

    Args:
        model: alias, hub id or folder.
        request: what is asked, as one object.
        revision: branch, tag or commit of a hub model.
        offline: open no socket.
        keep_source, passes: as of ``fit``; they decide what is fetched, and what memory the fit takes.
        keep_vision: as of ``fit``.
        levers: fields of ``PlanRequest``, which says what they mean: ``budget``, ``device``, ``context``, ``rate``,
            ``scope``, ``precision``, ``bits``, ``dense_precision``, ``kv_precision``, ``prefer``, ``min_resident``,
            ``method``, ``widths``, ``calibration_tokens``. They win over those of ``request``.

    Raises:
        DoesNotFit: nothing meets the budget; says the smallest one that works.
        ModelNotFound, CheckpointError, UnsupportedModel, UsageError: as their names say.
    """
    from conmoe_edge.checkpoint.quantised.stored import Stored
    from conmoe_edge.model.generation_file import read_generation
    from conmoe_edge.model.opened import anatomy_of
    from conmoe_edge.model.probe import count_in
    from conmoe_edge.model.source_facts import read_gguf, read_source

    asked = resolve_request(request, levers)
    found = describe(model, revision=revision, offline=offline)
    if found.gguf is not None:
        source = read_gguf(found.gguf)
    else:
        stored = {
            name: Stored(one.dtype, one.nbytes, one.shape) for name, one in found.tensors.items()
        }
        source = read_source(found.path, stored, found.peek)
    config = source.config
    anatomy = anatomy_of(source, keep_vision=keep_vision)
    if found.index is not None:  # the weights are here, and so are the small files
        read_generation(found.path, count_in(config.get_text_config(), "vocab_size"))
    report = report_on(found.hub_id or found.name, anatomy, asked, Path(), _identity(found))
    report = with_export(report, asked, config)
    report = with_tokenizer(report, tried_tokenizer(found.path, found.gguf))
    report = with_other_parts(report, source.beside, kept=keep_vision)
    passes = passes or (2 if found.index is not None or keep_source else 1)
    report = with_memory(report, asked, passes)
    if found.index is not None:
        return report
    sizes = {name: one.nbytes for name, one in found.tensors.items()}
    return with_fetching(report, sizes, asked, keep_source=keep_source, passes=passes)


def with_tokenizer(report: PlanReport, tried: Any) -> PlanReport:
    """The report with what came of ``tried_tokenizer``."""
    if isinstance(tried, CalibrationError):
        return replace(report, tokenizer=False, tokenizer_fault=tried.why, tokenizer_fix=tried.fix)
    return replace(report, tokenizer=True)


def with_export(report: PlanReport, asked: Resolved, config: Any) -> PlanReport:
    """The report with what other engines can be given of the package.

    Raises:
        UnsupportedModel: as ``export_outlook``.
    """
    note = export_outlook(
        config,
        report.anatomy,
        report.plan,
        asked.method,
        asked.request.engine,
        report.scopes_tried,
    )
    return replace(report, export_note=note)


def with_other_parts(report: PlanReport, beside: OtherParts, *, kept: bool) -> PlanReport:
    """The report with what the model has beside its text model.

    Raises:
        UsageError: it is to be ``kept``, and there is nothing.
    """
    if kept and not beside.tensors:
        raise UsageError(
            "There is nothing that --keep-vision could keep.",
            "the checkpoint has no tensors of parts for pictures or sound",
            "the same command without --keep-vision",
        )
    return replace(report, beside=beside, keeps_vision=kept)


@dataclass(frozen=True, slots=True)
class Resolved:
    """A request that names its method.

    Attributes:
        request: with the method's name, and the precision that the method needs.
        method: itself.
        note: why it is that one, where the default gave way; else empty.
    """

    request: PlanRequest
    method: Method
    note: str


def resolve_request(request: PlanRequest | None, levers: Levers) -> Resolved:
    """The request with ``levers`` in it.

    Raises:
        UsageError: a lever has a value that makes no sense, or the method cannot be had with the others.
    """
    from conmoe_edge.compress.methods.resolve_method import asked_method

    request = replace(request or PlanRequest(), **levers)
    if request.engine is not None:
        request = request_for(request.engine, request)
    precision = FREE if request.free else request.precision
    asked = asked_method(request.method, request.scope, precision)
    named = replace(request, method=asked.method.name, precision=asked.precision)
    return Resolved(named, asked.method, asked.note)


def report_on(
    name: str,
    anatomy: ModelAnatomy,
    asked: Resolved,
    folder: Path,
    identity: Mapping[str, Any] | None,
) -> PlanReport:
    """Decide for a model whose package will lie in ``folder``, or on the same disk; ``identity`` is the model's
    fingerprint where it is known.
    """
    from conmoe_edge.model.accelerator import facts_for  # loads torch

    request = asked.request
    meter = Meter(folder)
    budget = resolve_budget(
        request.budget, request.device, facts=facts_for(request.device), meter=meter
    )
    decided = make_plan(anatomy, budget, request, trims=asked.method.trims)
    rates = None
    if request.engine is None and budget.measured and budget.device == "cpu":
        rates = arithmetic_here(meter)
    return PlanReport(
        source_name=name,
        anatomy=anatomy,
        plan=decided,
        prompt=None if rates is None else planned_prompt(anatomy, decided, rates),
        method=asked.method.name,
        method_note=asked.note,
        outcomes=() if identity is None or asked.request.equal else recall(identity["id"]),
        scopes_tried=scopes_to_try(anatomy, request, decided.chosen, keeps=asked.method.keeps),
    )


def with_memory(report: PlanReport, asked: Resolved, passes: int) -> PlanReport:
    """The report with what the fit itself takes."""
    if stays_whole(report, asked):
        return report
    return replace(report, memory=memory_of_fit(report, asked, asked.request.tokens, passes))


def memory_of_fit(report: PlanReport, asked: Resolved, tokens: int, passes: int) -> FitMemory:
    """What the fit of a plan takes with so many calibration tokens."""
    import torch

    from conmoe_edge.compress.stream.layer_stream import compute_dtype

    on_host = asked.request.device == "cpu" or not torch.cuda.is_available()
    device = torch.device("cpu" if on_host else "cuda")
    wide = compute_dtype(device, getattr(torch, report.anatomy.dtype)).itemsize
    return fit_memory(
        report.anatomy,
        tokens,
        trims=asked.method.trims,
        precision=report.plan.chosen.precision,
        dense=report.plan.dense_precision,
        surveys=passes > 1 and _surveys(report, asked),
        wide=wide,
        on_host=on_host,
    )


def _surveys(report: PlanReport, asked: Resolved) -> bool:
    """Whether a second pass measures what each layer is worth."""
    chosen = report.plan.chosen
    return asked.method.budgets and shares_out(chosen.precision, chosen.rate, chosen.width)


def arithmetic_here(meter: Meter) -> Arithmetic | None:
    """What this machine's processor computes: half a second, once a day. ``None`` before the operator was compiled, for
    which a plan does not wait.
    """
    import torch

    from conmoe_edge.offload.generation.benchmark import byte_rate, matrix_rate
    from conmoe_edge.offload.kernels.cpu.build import is_built
    from conmoe_edge.offload.kernels.cpu.unavailable import Unavailable

    cpu = torch.device("cpu")
    try:
        if not is_built():
            return None
        in_bytes = meter.figure(f"byte-operations-{threads()}", lambda: byte_rate(cpu))
    except Unavailable:
        in_bytes = 0.0
    floats = meter.figure(f"flops-{threads()}", lambda: matrix_rate(cpu))
    return None if floats is None else Arithmetic(floats, in_bytes or 0.0)


def stays_whole(report: PlanReport, asked: Resolved) -> bool:
    """Whether ``fit`` leaves the model as it is: it fits so, and nobody named a rate."""
    return report.plan.unchanged and asked.request.rate == "auto"


def with_fetching(
    report: PlanReport,
    sizes: Mapping[str, int],
    asked: Resolved,
    *,
    keep_source: bool,
    passes: int,
) -> PlanReport:
    """With what comes from the hub. ``sizes``: bytes of every tensor there, by name."""
    whole = keep_source or stays_whole(report, asked)
    if not whole and not report.keeps_vision:
        left_out = frozenset(report.beside.tensors)
        sizes = {name: size for name, size in sizes.items() if name not in left_out}
    layers: dict[Unit, int] = {}
    for name, nbytes in sizes.items():
        if (unit := unit_of(name)) is not None:
            layers[unit] = layers.get(unit, 0) + nbytes
    found = fetching_of(
        report.plan,
        report.anatomy,
        total_bytes=sum(sizes.values()),
        layer_bytes=max(layers.values(), default=0),
        whole=whole,
        passes=passes,
        tries=bool(report.scopes_tried) or _surveys(report, asked),
    )
    return replace(report, fetching=found)


def _identity(found: Description) -> Mapping[str, Any] | None:
    """The fingerprint of a model; ``None`` where its weights are not there or cannot be read."""
    try:
        return None if found.index is None else fingerprint(found.index, found.path)
    except (ConmoeError, OSError):
        return None
