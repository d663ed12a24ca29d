"""``fit``: the plan, carried out. Nothing is printed; ``on_plan`` and ``progress`` are called on the way."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from conmoe_edge import __version__
from conmoe_edge.api.planning import Levers, PlanReport, outcomes_of
from conmoe_edge.api.shared import (
    CALIBRATION_TOKENS,
    HELD_OUT_SHARE,
    SEQUENCE_LENGTH,
    anatomy_of,
    tokenizer_of,
)
from conmoe_edge.checkpoint.format.manifest import UNCHANGED, Manifest
from conmoe_edge.checkpoint.fs.disk import require_space
from conmoe_edge.checkpoint.package.linked import link_model
from conmoe_edge.checkpoint.package.manifest_io import save_manifest, verify_package
from conmoe_edge.checkpoint.package.staged import StagedFolder
from conmoe_edge.checkpoint.sources.locate import Source, locate
from conmoe_edge.checkpoint.tensors.fingerprint import fingerprint
from conmoe_edge.checkpoint.tensors.tensor_index import CheckpointIndex
from conmoe_edge.memory.outcomes import Outcome, remember
from conmoe_edge.plan.dense_precision import stored
from conmoe_edge.plan.plan import Plan, Preference
from conmoe_edge.plan.serialise import plan_from_json, plan_to_json
from conmoe_edge.plan.width_levers import Widths, check_widths

if TYPE_CHECKING:
    from conmoe_edge.compress.run.job import OnProgress

PLAN_FILE = "plan.json"


@dataclass(frozen=True, slots=True)
class FitReport:
    """What a fit did. ``seconds`` by part, earlier runs of the same fit included; ``resumed_from``
    layers were there; ``notes`` are the method's, such as a fallback that was taken.
    """

    out: Path
    plan: PlanReport
    receipt: dict[str, Any]
    seconds: dict[str, float] = field(default_factory=dict)
    resumed_from: int = 0
    bytes_written: int = 0
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain JSON."""
        return {
            **self.plan.to_json(),
            "out": str(self.out),
            "receipt": self.receipt,
            "seconds": self.seconds,
            "resumed_from": self.resumed_from,
            "bytes_written": self.bytes_written,
            "notes": list(self.notes),
        }


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
    widths: Widths = "free",
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
        method, widths: as of ``plan``.
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

    from conmoe_edge.compress.methods.feasibility import check_reach
    from conmoe_edge.compress.methods.resolve_method import asked_method
    from conmoe_edge.compress.pipeline import Consolidation
    from conmoe_edge.compress.run.job import Job, Progress
    from conmoe_edge.compress.stream.calibration_text import bundled_text, read_text, token_sets
    from conmoe_edge.compress.stream.layer_stream import compute_dtype
    from conmoe_edge.model.bridge import read_config
    from conmoe_edge.offload.simulate.planned_caching import planned_caching

    asked = asked_method(method, scope, precision)
    tell = progress or (lambda step: None)
    text = bundled_text() if calibration is None else read_text(Path(calibration))
    levers = Levers(
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
        check_widths(widths) == "equal",
    )
    tell(Progress("locate", 0, 1, model))
    source = locate(model, revision=revision, offline=offline)
    index = CheckpointIndex.open(source.path)
    config = read_config(str(source.path))
    anatomy = anatomy_of(
        config, {name: (e.torch_name, e.nbytes) for name, e in index.tensors.items()}
    )
    tokens = calibration_tokens or CALIBRATION_TOKENS
    report = PlanReport(
        source.hub_id or source.name,
        anatomy,
        levers.plan(anatomy, Path(out), tokens),
        asked.method.name,
        asked.note,
        outcomes_of(source.path),
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
        "widths": widths,
        "calibration": text.sha256,
        "calibration_tokens": tokens,
        "seed": seed,
        "computed_in": str(compute_dtype(target, getattr(torch, anatomy.dtype))),
        "version": __version__,
    }
    require_space(Path(out), report.plan.disk_bytes + report.plan.scratch_bytes)
    tokenizer = tokenizer_of(source.path)
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
            equal=levers.equal,
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
            manifest.notes,
        )


def _same_plan(path: Path, report: PlanReport) -> PlanReport:
    """The plan that an unfinished run began with: free memory may have changed since, the package must not."""
    from conmoe_edge.checkpoint.fs.atomic_files import write_json
    from conmoe_edge.checkpoint.tensors.tensor_index import read_json_object

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
