"""The three calls of the package: ``plan``, ``fit``, ``load``.

They join the layers below: where a model is, what it looks like, what the machine gives, what will be done, doing it,
running it. Nothing is printed here; ``on_plan`` and ``progress`` are called on the way.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
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
from conmoe_edge.errors import CalibrationError, UsageError
from conmoe_edge.memory.bandwidth import Meter
from conmoe_edge.memory.budget import Budget
from conmoe_edge.memory.resolve import resolve_budget
from conmoe_edge.model.anatomy import ModelAnatomy
from conmoe_edge.plan.dense import stored
from conmoe_edge.plan.plan import Plan, Preference
from conmoe_edge.plan.planner import make_plan
from conmoe_edge.plan.serialise import plan_from_json, plan_to_json

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

    from conmoe_edge.compress.pipeline import OnProgress
    from conmoe_edge.export.hf import Exported

SEQUENCE_LENGTH = 512
CALIBRATION_TOKENS = 64 * SEQUENCE_LENGTH
HELD_OUT_SHARE = 4
PLAN_FILE = "plan.json"


@dataclass(frozen=True, slots=True)
class PlanReport:
    """A plan and what it is for."""

    source_name: str
    anatomy: ModelAnatomy
    plan: Plan

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
            "plan": plan_to_json(self.plan),
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
        revision: branch, tag or commit of a hub model.
        offline: open no socket.

    Raises:
        DoesNotFit: nothing meets the budget; says the smallest one that works.
        ModelNotFound, CheckpointError, UnsupportedModel, UsageError: as their names say.
    """
    from conmoe_edge.model.bridge import read_config

    levers = _Levers(
        budget, device, context, rate, scope, precision, dense_precision, prefer, min_resident
    )
    found = describe(model, revision=revision, offline=offline)
    headers = {name: (header.dtype, header.nbytes) for name, header in found.tensors.items()}
    anatomy = _anatomy(read_config(str(found.path)), headers)
    return PlanReport(found.hub_id or found.name, anatomy, levers.plan(anatomy, Path()))


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
    method: str = "conmoe",
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
        method: consolidation method.
        calibration: UTF-8 text to calibrate on; the text that comes with the package by default.
        calibration_tokens: how much of it.
        seed: for methods that draw random numbers.
        fresh: throw away an unfinished run instead of going on with it.
        overwrite: replace an existing package.
        on_plan: called with the plan before anything is written; may raise to stop.
        progress: called after every step.

    Raises:
        ConmoeError: one of its subclasses; nothing half-written is left, and an interrupted run can go on.
    """
    import torch

    from conmoe_edge.compress.calibration import bundled_text, read_text, token_sets
    from conmoe_edge.compress.methods import METHODS
    from conmoe_edge.compress.pipeline import Consolidation, Job, Progress
    from conmoe_edge.compress.stream import compute_dtype
    from conmoe_edge.model.bridge import read_config
    from conmoe_edge.offload.planned import planned_caching

    if method not in METHODS:
        raise UsageError(
            f"{method!r} is not a method.", f"there are: {', '.join(METHODS)}", "--method conmoe"
        )
    if METHODS[method].needs.target and scope not in (1, "auto"):
        raise UsageError(
            f"{method} shares prototypes within a layer only.",
            f"you asked for scopes of {scope} layers",
            "--scope 1, or --method conmoe",
        )
    tell = progress or (lambda step: None)
    text = bundled_text() if calibration is None else read_text(Path(calibration))
    levers = _Levers(
        budget,
        device,
        context,
        rate,
        scope,
        precision,
        dense_precision,
        prefer,
        min_resident,
        METHODS[method].trims,
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
        source.hub_id or source.name, anatomy, levers.plan(anatomy, Path(out), tokens)
    )
    if on_plan is not None:
        on_plan(report)
    if report.plan.unchanged and rate == "auto":
        return _fit_unchanged(source, index, Path(out), report, overwrite=overwrite, fresh=fresh)
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
        "precision": precision,
        "dense_precision": dense_precision,
        "prefer": prefer,
        "min_resident": min_resident,
        "method": method,
        "calibration": text.sha256,
        "calibration_tokens": tokens,
        "seed": seed,
        "computed_in": str(compute_dtype(target, getattr(torch, anatomy.dtype))),
        "version": __version__,
    }
    require_space(Path(out), report.plan.disk_bytes + report.plan.scratch_bytes)
    tokenizer = _tokenizer(source.path)
    train, held_out = token_sets(
        text, tokenizer, length=length, tokens=tokens, held_out_tokens=tokens // HELD_OUT_SHARE
    )
    with StagedFolder(Path(out), settings, overwrite=overwrite, fresh=fresh) as staged:
        report = _same_plan(staged.work / PLAN_FILE, report)
        chosen = report.plan.chosen
        job = Job(
            index=index,
            config=config,
            anatomy=anatomy,
            method=method,
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
        with run.clock.part("cache"):
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
        run.clock.add("verify", time.perf_counter() - started)
        written = sum(facts["size"] for facts in manifest.files.values())
        return FitReport(
            staged.target, report, manifest.receipt, run.clock.seconds, run.resumed_from, written
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


def export(
    package: str | Path,
    out: str | Path,
    *,
    form: str = "hf",
    llama_cpp: str | Path | None = None,
    converter_python: str | Path | None = None,
    outtype: str = "auto",
    overwrite: bool = False,
    progress: OnProgress | None = None,
) -> Exported:
    """Write a package as a plain checkpoint, or as GGUF.

    Args:
        package: folder that ``fit`` wrote.
        out: the folder (``hf``) or file (``gguf``) to write; whole or absent at any moment.
        form: ``hf`` or ``gguf``.
        llama_cpp, converter_python, outtype: for ``gguf``: a clone of llama.cpp, the Python that has its converter's
            requirements, the number format of the file.
        overwrite: replace what an earlier export wrote.
        progress: called after every layer.

    Raises:
        UnsupportedModel: a plain checkpoint of this model cannot say what the package says.
        PackageError, OutputExists, NoSpace, UsageError: as their names say.
    """
    if form == "hf":
        from conmoe_edge.export.hf import export_hf

        return export_hf(Path(package), Path(out), overwrite=overwrite, progress=progress)
    if form != "gguf":
        raise UsageError(f"{form!r} is no format.", "there are: hf, gguf", "--format hf")
    from conmoe_edge.export.gguf import export_gguf

    return export_gguf(
        Path(package),
        Path(out),
        llama_cpp=None if llama_cpp is None else Path(llama_cpp),
        python=None if converter_python is None else Path(converter_python),
        outtype=outtype,
        overwrite=overwrite,
        progress=progress,
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
        return PlanReport(
            report.source_name, report.anatomy, plan_from_json(read_json_object(path))
        )
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
