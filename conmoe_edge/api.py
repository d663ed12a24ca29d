"""The calls of the package: ``plan``, ``fit``, ``load``, ``evaluate``, ``evaluate_tasks``.

They join the layers below: where a model is, what it looks like, what the machine gives, what will be done, doing it,
running it. Nothing is printed here; ``on_plan`` and ``progress`` are called on the way.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from conmoe_edge import __version__
from conmoe_edge.checkpoint.disk import require_space
from conmoe_edge.checkpoint.fingerprint import fingerprint
from conmoe_edge.checkpoint.index import CheckpointIndex
from conmoe_edge.checkpoint.linked import link_model
from conmoe_edge.checkpoint.locate import Source, describe, locate
from conmoe_edge.checkpoint.manifest import UNCHANGED, Manifest
from conmoe_edge.checkpoint.manifest_io import save_manifest, verify_package
from conmoe_edge.checkpoint.staged import StagedFolder
from conmoe_edge.errors import CalibrationError, ConmoeError, UsageError
from conmoe_edge.memory.bandwidth import Meter
from conmoe_edge.memory.budget import Budget
from conmoe_edge.memory.outcomes import Outcome, recall, remember
from conmoe_edge.memory.resolve import resolve_budget
from conmoe_edge.model.anatomy import ModelAnatomy
from conmoe_edge.plan.advice import advise
from conmoe_edge.plan.dense import stored
from conmoe_edge.plan.plan import Plan, Preference
from conmoe_edge.plan.planner import make_plan
from conmoe_edge.plan.serialise import plan_from_json, plan_to_json

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

    from conmoe_edge.compress.job import OnProgress
    from conmoe_edge.compress.quality import Cost, EvaluationReport
    from conmoe_edge.integrations.harness import TaskReport

SEQUENCE_LENGTH = 512
CALIBRATION_TOKENS = 64 * SEQUENCE_LENGTH
HELD_OUT_SHARE = 4
PLAN_FILE = "plan.json"
CONTINUATIONS, PROMPT_TOKENS, CONTINUATION_TOKENS = 6, 64, 48


@dataclass(frozen=True, slots=True)
class PlanReport:
    """A plan and what it is for.

    Attributes:
        method: the consolidation method that the plan counts with.
        method_note: why it is that one, where the default gave way; else empty.
        outcomes: what earlier fits of this model on this machine cost, oldest first.
    """

    source_name: str
    anatomy: ModelAnatomy
    plan: Plan
    method: str = "auto"
    method_note: str = ""
    outcomes: tuple[Outcome, ...] = ()

    @property
    def advice(self) -> str:
        """What the outcomes say about the settings; empty where there are none."""
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
            "plan": plan_to_json(self.plan),
            "measured": [asdict(one) for one in self.outcomes],
            "advise": self.advice,
        }


@dataclass(frozen=True, slots=True)
class FitReport:
    """What a fit did. ``seconds`` by part, earlier runs of the same fit included; ``resumed_from``
    layers were there.
    """

    out: Path
    plan: PlanReport
    receipt: dict[str, Any]
    seconds: dict[str, float] = field(default_factory=dict)
    resumed_from: int = 0
    bytes_written: int = 0

    def to_json(self) -> dict[str, Any]:
        """Plain JSON."""
        return {
            **self.plan.to_json(),
            "out": str(self.out),
            "receipt": self.receipt,
            "seconds": self.seconds,
            "resumed_from": self.resumed_from,
            "bytes_written": self.bytes_written,
        }


@dataclass(frozen=True, slots=True)
class _Levers:
    """What the caller asked of the plan; ``trims``: the method removes neurons as well."""

    budget: str
    device: Literal["auto", "cpu", "cuda"]
    context: int | None
    rate: float | Literal["auto"]
    scope: int | Literal["auto"]
    precision: str
    dense_precision: str
    prefer: Preference
    min_resident: float | None
    trims: bool = False

    def plan(self, anatomy: ModelAnatomy, folder: Path, tokens: int = CALIBRATION_TOKENS) -> Plan:
        """Decide for a model whose package will lie in ``folder``, or on the same disk."""
        return make_plan(
            anatomy,
            resolve_budget(self.budget, self.device, meter=Meter(folder)),
            context=self.context,
            rate=self.rate,
            scope=self.scope,
            precision=self.precision,
            dense_precision=self.dense_precision,
            prefer=self.prefer,
            min_resident=self.min_resident,
            calibration_tokens=tokens,
            trims=self.trims,
        )


def plan(
    model: str,
    *,
    budget: str = "auto",
    device: Literal["auto", "cpu", "cuda"] = "auto",
    context: int | None = None,
    rate: float | Literal["auto"] = "auto",
    scope: int | Literal["auto"] = "auto",
    precision: str = "auto",
    dense_precision: str = "source",
    prefer: Preference = "quality",
    min_resident: float | None = None,
    method: str | None = None,
    revision: str | None = None,
    offline: bool = False,
) -> PlanReport:
    """What ``fit`` would do. Reads ``config.json`` and the headers of the weights, for a hub model without a download.

    Args:
        model: alias, hub id or folder.
        budget: a size (``24GB``, ``7.5GiB``), a profile (``rtx-4090``) or ``auto``.
        device: where the package will run; ``auto`` takes the GPU if this machine has one.
        context: tokens that the key-value cache must hold.
        rate, scope, precision: force a lever instead of leaving it to the plan.
        dense_precision: ``int8`` stores the linear layers outside the routed experts in 8 bits; embeddings, norms and
            routers keep their numbers.
        prefer: ``speed`` wants every prototype resident, ``quality`` most of them.
        min_resident: the least share of prototypes that is resident, instead of what ``prefer`` says.
        method: consolidation method; by default ``auto``, or ``conmoe`` where ``scope`` is more than one layer.
        revision: branch, tag or commit of a hub model.
        offline: open no socket.

    Raises:
        DoesNotFit: nothing meets the budget; says the smallest one that works.
        ModelNotFound, CheckpointError, UnsupportedModel, UsageError: as their names say.
    """
    from conmoe_edge.compress.methods.asked import asked_method
    from conmoe_edge.model.bridge import read_config

    asked = asked_method(method, scope, precision)
    levers = _Levers(
        budget,
        device,
        context,
        rate,
        scope,
        asked.precision,
        dense_precision,
        prefer,
        min_resident,
        asked.method.trims,
    )
    found = describe(model, revision=revision, offline=offline)
    headers = {name: (header.dtype, header.nbytes) for name, header in found.tensors.items()}
    anatomy = _anatomy(read_config(str(found.path)), headers)
    name = found.hub_id or found.name
    decided = levers.plan(anatomy, Path())
    return PlanReport(
        name, anatomy, decided, asked.method.name, asked.note, _outcomes_of(found.path)
    )


def fit(
    model: str,
    out: str | Path,
    *,
    budget: str = "auto",
    device: Literal["auto", "cpu", "cuda"] = "auto",
    context: int | None = None,
    rate: float | Literal["auto"] = "auto",
    scope: int | Literal["auto"] = "auto",
    precision: str = "auto",
    dense_precision: str = "source",
    prefer: Preference = "quality",
    min_resident: float | None = None,
    revision: str | None = None,
    offline: bool = False,
    method: str | None = None,
    calibration: str | Path | None = None,
    calibration_tokens: int | None = None,
    seed: int = 0,
    fresh: bool = False,
    overwrite: bool = False,
    on_plan: Callable[[PlanReport], None] | None = None,
    progress: OnProgress | None = None,
) -> FitReport:
    """Consolidate a model so that it fits, and write the package ``out``. The levers are those of ``plan``.

    Args:
        out: the output folder; it is whole or absent at any moment.
        method: consolidation method, as of ``plan``.
        calibration: UTF-8 text to calibrate on; the text that comes with the package by default.
        calibration_tokens: how much of it.
        seed: which windows of the calibration text are used: 0 spreads them evenly over it, any other seed draws
            them. What is held out is the same for every seed.
        fresh: throw away an unfinished run instead of going on with it.
        overwrite: replace an existing package.
        on_plan: called with the plan before anything is written; may raise to stop.
        progress: called after every step.

    Raises:
        ConmoeError: one of its subclasses; nothing half-written is left, and an interrupted run can go on.
    """
    import torch

    from conmoe_edge.compress.calibration import bundled_text, read_text, token_sets
    from conmoe_edge.compress.job import Job, Progress
    from conmoe_edge.compress.methods.asked import asked_method
    from conmoe_edge.compress.pipeline import Consolidation
    from conmoe_edge.compress.reach import check_reach
    from conmoe_edge.compress.stream import compute_dtype
    from conmoe_edge.model.bridge import read_config
    from conmoe_edge.offload.planned import planned_caching

    asked = asked_method(method, scope, precision)
    tell = progress or (lambda step: None)
    text = bundled_text() if calibration is None else read_text(Path(calibration))
    levers = _Levers(
        budget,
        device,
        context,
        rate,
        scope,
        asked.precision,
        dense_precision,
        prefer,
        min_resident,
        asked.method.trims,
    )
    tell(Progress("locate", 0, 1, model))
    source = locate(model, revision=revision, offline=offline)
    index = CheckpointIndex.open(source.path)
    config = read_config(str(source.path))
    anatomy = _anatomy(
        config, {name: (e.torch_name, e.nbytes) for name, e in index.tensors.items()}
    )
    tokens = calibration_tokens or CALIBRATION_TOKENS
    report = PlanReport(
        source.hub_id or source.name,
        anatomy,
        levers.plan(anatomy, Path(out), tokens),
        asked.method.name,
        asked.note,
        _outcomes_of(source.path),
    )
    if on_plan is not None:
        on_plan(report)
    if report.plan.unchanged and rate == "auto":
        return _fit_unchanged(source, index, Path(out), report, overwrite=overwrite, fresh=fresh)
    planned = report.plan.chosen
    check_reach(config, anatomy, asked.method, planned.rate, planned.scope)
    identity = fingerprint(index, (source.path / "config.json").read_bytes())
    target = torch.device("cuda" if torch.cuda.is_available() and device != "cpu" else "cpu")
    length = min(SEQUENCE_LENGTH, anatomy.max_context)
    settings = {
        "model": identity["id"],
        "budget": budget,
        "device": device,
        "context": context,
        "rate": rate,
        "scope": scope,
        "precision": asked.precision,
        "dense_precision": dense_precision,
        "prefer": prefer,
        "min_resident": min_resident,
        "method": asked.method.name,
        "calibration": text.sha256,
        "calibration_tokens": tokens,
        "seed": seed,
        "computed_in": str(compute_dtype(target, getattr(torch, anatomy.dtype))),
        "version": __version__,
    }
    require_space(Path(out), report.plan.disk_bytes + report.plan.scratch_bytes)
    tokenizer = _tokenizer(source.path)
    train, held_out = token_sets(
        text,
        tokenizer,
        length=length,
        tokens=tokens,
        held_out_tokens=tokens // HELD_OUT_SHARE,
        seed=seed,
    )
    with StagedFolder(Path(out), settings, overwrite=overwrite, fresh=fresh) as staged:
        report = _same_plan(staged.work / PLAN_FILE, report)
        chosen = report.plan.chosen
        job = Job(
            index=index,
            config=config,
            anatomy=anatomy,
            method=asked.method.name,
            rate=chosen.rate,
            scope=chosen.scope,
            precision=chosen.precision,
            dense_precision=report.plan.dense_precision,
            wide_prototypes=chosen.wide_prototypes,
            train=train,
            held_out=held_out,
            device=target,
            plan=plan_to_json(report.plan),
            source={
                "name": report.source_name,
                "revision": source.revision,
                "fingerprint": identity,
            },
            tool_version=__version__,
            predict=chosen.slots < chosen.prototypes,
        )
        run = Consolidation(job, staged.path, staged.work, tell)
        manifest = run.run()
        with run.state.clock.part("cache"):
            manifest = planned_caching(
                staged.path,
                manifest,
                run.predictions(),
                stored(anatomy, report.plan.dense_precision),
                report.plan.budget,
                report.plan.left_for_prototypes,
            )
        started = time.perf_counter()
        tell(Progress("verify", 0, 1, "package"))
        save_manifest(staged.path, manifest)
        verify_package(staged.path)
        staged.commit()
        run.state.clock.add("verify", time.perf_counter() - started)
        written = sum(facts["size"] for facts in manifest.files.values())
        _remember(identity["id"], report.plan, manifest, text.sha256)
        return FitReport(
            staged.target,
            report,
            manifest.receipt,
            run.state.clock.seconds,
            run.state.resumed_from,
            written,
        )


def load(
    path: str | Path,
    budget: str | Budget | None = None,
    device: str | None = None,
    context: int | None = None,
    cache_policy: str | None = None,
) -> PreTrainedModel:
    """Open a package: a transformers model whose ``generate`` works, inside the budget.

    Args:
        path: folder that ``fit`` wrote.
        budget: as for ``plan``; by default what the package was planned for.
        device: ``cpu`` or ``cuda``; by default what the budget says.
        context: tokens that the key-value cache must hold; by default what was planned.
        cache_policy: who goes when a cache slot is wanted: ``lru``, ``layer-lru``, ``lfru``, ``pins``; by default what
            would have had the most hits on the calibration's routing. Changes speed only.

    Raises:
        PackageError: the folder is no package, or it is damaged.
        DoesNotFit: the budget is too small even for one cache slot a layer.
    """
    from conmoe_edge.integrations.load import load_package

    if isinstance(budget, str):
        budget = resolve_budget(budget, device if device in ("cpu", "cuda") else "auto")  # type: ignore[arg-type]
    return load_package(
        Path(path), budget=budget, device=device, context=context, cache_policy=cache_policy
    )


def evaluate(
    model: str | Path,
    *,
    against: str | Path | None = None,
    text: str | Path | None = None,
    tokens: int = CALIBRATION_TOKENS // HELD_OUT_SHARE,
    sequence_length: int = SEQUENCE_LENGTH,
    seed: int = 0,
    continuations: int = CONTINUATIONS,
    prompt_tokens: int = PROMPT_TOKENS,
    continuation_tokens: int = CONTINUATION_TOKENS,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    revision: str | None = None,
    offline: bool = False,
    on_cost: Callable[[Cost], None] | None = None,
    progress: OnProgress | None = None,
) -> EvaluationReport:
    """How good a package or a model is on text, beside the model that it was made from. Both are
    streamed, so neither has to fit in memory.

    Args:
        model: a package, or a model by alias, hub id or folder.
        against: what to compare with, a package or a model; ``"none"`` for nothing. By default the model that the
            package was made from, where it is found on this machine.
        text: UTF-8 text, which may name domains; by default the held-out text that comes with the package, of which
            the receipt of ``fit`` has the first ``tokens`` as well.
        tokens: of the text, at the most.
        sequence_length: tokens of one sequence.
        seed: which parts of the text: 0 spreads them evenly, others draw them.
        continuations: prompts that are continued greedily; 0 for none.
        prompt_tokens, continuation_tokens: of each.
        device: where to compute.
        revision: branch, tag or commit, where ``model`` is on the hub.
        offline: open no socket.
        on_cost: called before anything is computed.
        progress: called on the way.

    Raises:
        CheckpointError: a model is damaged, or the package's source has changed.
        CalibrationError: the text cannot be read or is too short.
        UsageError: the two have different tokenizers.
    """
    import torch

    from conmoe_edge.compress.calibration import bundled_text, read_text
    from conmoe_edge.compress.evaluate import Folder, Settings, described, manifest_of
    from conmoe_edge.compress.evaluate import evaluate as measured
    from conmoe_edge.compress.job import Progress
    from conmoe_edge.compress.quality import EvaluationReport
    from conmoe_edge.memory.machine import measure_machine
    from conmoe_edge.model.bridge import read_config

    tell = progress or (lambda step: None)
    words = read_text(Path(text), "--text", "text") if text is not None else bundled_text()
    if min(tokens, sequence_length) < 2 or (
        continuations and min(prompt_tokens, continuation_tokens) < 1
    ):
        raise UsageError(
            "There is nothing to measure.", "tokens and their sequences need two at least"
        )
    tell(Progress("locate", 0, 1, str(model)))
    ours = locate(str(model), revision=revision, offline=offline)
    manifest = manifest_of(ours.path)
    theirs, is_origin, alone = _reference(manifest, against, offline=offline)
    one = Folder(ours.name, ours.path, _tokenizer(ours.path))
    other = None
    if theirs is not None:
        other = Folder(theirs.name, theirs.path, _tokenizer(theirs.path))
    where = torch.device("cuda" if torch.cuda.is_available() and device != "cpu" else "cpu")
    free = (
        torch.cuda.mem_get_info(where)[0] if where.type == "cuda" else measure_machine().ram_usable
    )
    longest = int(
        getattr(read_config(str(ours.path)).get_text_config(), "max_position_embeddings", 0)
        or 1 << 20
    )
    settings = Settings(
        tokens=tokens,
        sequence_length=min(sequence_length, longest),
        seed=seed,
        continuations=continuations,
        prompt_tokens=max(1, min(prompt_tokens, longest - continuation_tokens)),
        steps=min(continuation_tokens, longest - 1),
        device=where,
        free_memory=free,
    )
    total, domains, continued, cost, seconds = measured(
        one, other, words, settings, on_cost=on_cost, progress=tell
    )
    sizes = [_experts_bytes(folder.path) for folder in (one, other) if folder is not None]
    return EvaluationReport(
        model=described(one, sizes[0]),
        reference=None if other is None else described(other, sizes[1], is_origin),
        quality=total,
        per_domain=domains,
        continuations=continued,
        settings={
            "text": "bundled" if text is None else str(text),
            "text_sha256": words.sha256,
            "tokens": tokens,
            "sequence_length": settings.sequence_length,
            "seed": seed,
            "device": where.type,
            "held": list(cost.held),
        },
        alone=alone,
        seconds=seconds,
    )


def evaluate_tasks(
    path: str | Path,
    tasks: Sequence[str],
    *,
    tasks_path: str | Path | None = None,
    limit: int | None = None,
    fewshot: int | None = None,
    budget: str | Budget | None = None,
    device: str | None = None,
    context: int | None = None,
    bars: bool = True,
) -> TaskReport:
    """Tasks of lm-eval on a package that runs inside its budget. Needs ``pip install 'conmoe-edge[eval]'``.

    Args:
        path: folder that ``fit`` wrote.
        tasks: names as lm-eval has them.
        tasks_path: a folder with task files of your own.
        limit: examples of each task at the most.
        fewshot: examples in front of each question; by default what the task says.
        bars: whether lm-eval shows its progress on stderr.
        budget, device, context: as for ``load``. The scores of one sequence over the vocabulary, which lm-eval asks
            for, come on top of the budget.

    Raises:
        UsageError: lm-eval is not installed, or there is no such task.
        ConmoeError: a task cannot be run, as without its data.
    """
    from conmoe_edge.integrations.harness import require_harness, run_tasks

    require_harness()
    model = load(path, budget=budget, device=device, context=context)
    return run_tasks(
        model,
        _tokenizer(Path(path)),
        tasks,
        tasks_path=None if tasks_path is None else Path(tasks_path),
        limit=limit,
        fewshot=fewshot,
        bars=bars,
    )


def _reference(
    manifest: Manifest | None, against: str | Path | None, *, offline: bool
) -> tuple[Source | None, bool | None, str]:
    """What a model is compared with, whether a package was made from it, and if nothing, why."""
    from conmoe_edge.checkpoint.origin import differs, find_origin, fingerprint_of
    from conmoe_edge.compress.evaluate import manifest_of

    if against is not None and str(against) != "none":
        found = locate(str(against), offline=offline)
        if manifest is None or manifest_of(found.path) is not None:
            return found, None, ""
        return found, not differs(manifest.source.get("fingerprint"), fingerprint_of(found)), ""
    if against is not None:
        return None, None, "as asked"
    if manifest is None:
        return None, None, "a model by itself; --against names one to compare it with"
    found = find_origin(manifest)
    if found is not None:
        return found, True, ""
    named = manifest.source.get("name") or "the model that it was made from"
    return None, None, f"{named} is not on this machine; --against names one to compare with"


def _experts_bytes(folder: Path) -> int:
    """Bytes of the routed experts of a plain model in a folder."""
    from conmoe_edge.compress.evaluate import manifest_of
    from conmoe_edge.model.bridge import read_config

    manifest = manifest_of(folder)
    if manifest is not None and manifest.method != UNCHANGED:
        return 0
    index = CheckpointIndex.open(folder)
    headers = {name: (e.torch_name, e.nbytes) for name, e in index.tensors.items()}
    return _anatomy(read_config(str(folder)), headers).experts_bytes


def _outcomes_of(folder: Path) -> tuple[Outcome, ...]:
    """What earlier fits of the model in ``folder`` cost; nothing where its weights are not there."""
    try:
        index = CheckpointIndex.open(folder)
        return recall(fingerprint(index, (folder / "config.json").read_bytes())["id"])
    except (ConmoeError, OSError):
        return ()


def _remember(model: str, plan: Plan, manifest: Manifest, calibration: str) -> None:
    """Keep what a fit cost for later plans of the same model."""
    receipt = manifest.receipt
    if not receipt:
        return
    chosen = plan.chosen
    remember(
        Outcome(
            model=model,
            method=manifest.method,
            rate=chosen.rate,
            scope=chosen.scope,
            precision=chosen.precision,
            dense_precision=plan.dense_precision,
            wide_prototypes=chosen.wide_prototypes,
            pool_bytes=chosen.pool_bytes,
            loss_rise=receipt["loss_consolidated"] - receipt["loss_original"],
            kl=receipt["kl"],
            tokens=receipt["tokens"],
            calibration=calibration,
            version=__version__,
        )
    )


def _anatomy(config: PretrainedConfig, headers: dict[str, tuple[str, int]]) -> ModelAnatomy:
    from conmoe_edge.model.probe import TensorFacts, probe

    return probe(config, {name: TensorFacts(*facts) for name, facts in headers.items()})


def _tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError, TypeError, ImportError, AttributeError) as error:
        reason = str(error).strip().splitlines()
        raise CalibrationError(
            f"{folder} has no tokenizer that can be used.",
            (reason[0] if reason else type(error).__name__)[:200],
            "put the model's tokenizer.json and tokenizer_config.json into the folder",
        ) from error


def _same_plan(path: Path, report: PlanReport) -> PlanReport:
    """The plan that an unfinished run began with: free memory may have changed since, the package must not."""
    from conmoe_edge.checkpoint.files import write_json
    from conmoe_edge.checkpoint.index import read_json_object

    if path.is_file():
        return replace(report, plan=plan_from_json(read_json_object(path)))
    write_json(path, plan_to_json(report.plan))
    return report


def _fit_unchanged(
    source: Source,
    index: CheckpointIndex,
    out: Path,
    report: PlanReport,
    *,
    overwrite: bool,
    fresh: bool,
) -> FitReport:
    """The model fits as it is: link it, say so, and change nothing."""
    identity = fingerprint(index, (source.path / "config.json").read_bytes())
    with StagedFolder(
        out, {"unchanged": identity["id"]}, overwrite=overwrite, fresh=fresh
    ) as staged:
        written = link_model(index, staged.path)
        manifest = Manifest(
            source={
                "name": report.source_name,
                "revision": source.revision,
                "fingerprint": identity,
            },
            method=UNCHANGED,
            rate=0.0,
            scope=1,
            precision="source",
            layouts=(),
            prototypes=(),
            slots={},
            files={file.name: file.entry() for file in sorted(written, key=lambda file: file.name)},
            plan=plan_to_json(report.plan),
            tool_version=__version__,
        )
        save_manifest(staged.path, manifest)
        verify_package(staged.path)
        staged.commit()
        return FitReport(staged.target, report, {}, {}, 0, sum(file.size for file in written))
