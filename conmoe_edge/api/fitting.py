"""``fit``: the plan, carried out. Nothing is printed; ``on_plan`` and ``progress`` are called on the way."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

from conmoe_edge import __version__
from conmoe_edge.api.planning import (
    PlanReport,
    Resolved,
    memory_of_fit,
    report_on,
    resolve_request,
    stays_whole,
    with_export,
    with_fetching,
    with_other_parts,
    with_tokenizer,
)
from conmoe_edge.checkpoint.format.manifest import UNCHANGED, Manifest
from conmoe_edge.checkpoint.fs.disk import existing_parent, require_space
from conmoe_edge.checkpoint.package.linked import link_model
from conmoe_edge.checkpoint.package.manifest_io import save_manifest, verify_package
from conmoe_edge.checkpoint.package.staged import StagedFolder
from conmoe_edge.checkpoint.sources.locate import find, locate
from conmoe_edge.checkpoint.sources.origin import differs
from conmoe_edge.compress.quality.division import Division, division_of
from conmoe_edge.errors import CalibrationError, CheckpointError, NoSpace, OutOfMemory
from conmoe_edge.memory.budget import Budget
from conmoe_edge.memory.machine import measure_machine
from conmoe_edge.memory.outcomes import Outcome, remember
from conmoe_edge.model.tokenizers import tried_tokenizer
from conmoe_edge.plan.dense_precision import stored
from conmoe_edge.plan.fit_memory import most_tokens
from conmoe_edge.plan.plan import Plan
from conmoe_edge.plan.request import HELD_OUT_SHARE, SEQUENCE_LENGTH, Levers, PlanRequest
from conmoe_edge.plan.scope_choice import trial_bytes, with_scope
from conmoe_edge.plan.serialise import plan_from_json, plan_to_json
from conmoe_edge.units import human_size

if TYPE_CHECKING:
    from conmoe_edge.compress.run.job import OnProgress
    from conmoe_edge.model.anatomy import ModelAnatomy
    from conmoe_edge.model.opened import OpenedModel

PLAN_FILE = "plan.json"
NO_TOKENIZER = (
    "The model has no tokenizer that can be used, so chat, serve and eval refuse this package until its tokenizer.json "
    "and tokenizer_config.json are put into it."
)
ONLY_KV = "Keys and values in 8 bits are all that is not as in the model; conmoe-edge eval measures what that costs."


@dataclass(frozen=True, slots=True)
class FitReport:
    """What a fit did. ``seconds`` by part, earlier runs of the same fit included; ``resumed_from``
    layers were there; ``notes`` are the method's, such as a fallback that was taken; ``division`` says how many
    prototypes have which bits and how many neurons, empty where the model is linked as it is.
    """

    out: Path
    plan: PlanReport
    receipt: dict[str, Any]
    seconds: dict[str, float] = field(default_factory=dict)
    resumed_from: int = 0
    bytes_written: int = 0
    notes: tuple[str, ...] = ()
    division: tuple[Division, ...] = ()

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
            "division": [asdict(one) for one in self.division],
        }


def fit(
    model: str,
    out: str | Path,
    request: PlanRequest | None = None,
    *,
    revision: str | None = None,
    offline: bool = False,
    calibration: str | Path | None = None,
    seed: int = 0,
    fresh: bool = False,
    overwrite: bool = False,
    no_tokenizer: bool = False,
    keep_source: bool = False,
    passes: int | None = None,
    keep_vision: bool = False,
    on_plan: Callable[[PlanReport], None] | None = None,
    progress: OnProgress | None = None,
    **levers: Unpack[Levers],
) -> FitReport:
    """Consolidate a model so that it fits, and write the package ``out``.

    Args:
        model, request, revision, offline, levers: as of ``plan``.
        out: the output folder; it is whole or absent at any moment.
        calibration: UTF-8 text to calibrate on; the text that comes with the package by default.
        seed: which windows of the calibration text are used: 0 spreads them evenly over it, any other seed draws
            them. What is held out is the same for every seed.
        fresh: throw away an unfinished run instead of going on with it.
        overwrite: replace an existing package.
        no_tokenizer: write the package even if the model has no tokenizer that can be used. Only where the model fits
            as it is; the package's notes say so, and it cannot chat.
        keep_source: download a model from the hub whole, into the hub's cache, and read it there. Without it no more
            than a few layers of its weights are on this disk at any moment.
        passes: 1 reads every weight once; 2 measures first what each layer is worth, where the method asks for that.
            By default 2, and 1 where the weights come from the hub part by part.
        keep_vision: put a model's parts for pictures and sound into the package, unchanged; transformers' class for the
            whole model opens it then (``AutoModelForImageTextToText``). Without it the package is the text model.
        on_plan: called with the plan before anything is written; may raise to stop.
        progress: called after every step.

    Raises:
        ConmoeError: one of its subclasses; nothing half-written is left, and an interrupted run can go on.
    """
    import torch

    from conmoe_edge.compress.methods.feasibility import check_reach
    from conmoe_edge.compress.pipeline import Consolidation
    from conmoe_edge.compress.run.job import Job, Progress
    from conmoe_edge.compress.stream.calibration_text import bundled_text, read_text, token_sets
    from conmoe_edge.compress.stream.layer_stream import compute_dtype
    from conmoe_edge.compress.stream.match_places import MatchPlaces
    from conmoe_edge.model.opened import open_model
    from conmoe_edge.offload.simulate.machine_file import save_machine_file
    from conmoe_edge.offload.simulate.planned_caching import planned_caching, planned_prefetch

    asked = resolve_request(request, levers)
    tell = progress or (lambda step: None)
    text = bundled_text() if calibration is None else read_text(Path(calibration))
    tell(Progress("locate", 0, 1, model))
    source = open_model(find(model, revision=revision, offline=offline), keep_vision=keep_vision)
    anatomy = source.anatomy
    folder = source.folder
    passes = passes or (2 if source.ranges is None or keep_source else 1)
    report = report_on(source.name, anatomy, asked, Path(out), source.identity)
    report = with_export(report, asked, source.config)
    tried = tried_tokenizer(folder, source.gguf)
    report = with_tokenizer(report, tried)
    report = with_other_parts(report, source.beside, kept=keep_vision)
    if source.ranges is not None:
        sizes = {name: entry.nbytes for name, entry in source.index.tensors.items()}
        report = with_fetching(report, sizes, asked, keep_source=keep_source, passes=passes)
    if on_plan is not None:
        on_plan(report)
    unchanged = stays_whole(report, asked)
    tokenizer = _tokenizer(tried, unchanged=unchanged, may_lack=no_tokenizer)
    if unchanged:
        source = _downloaded(source, Path(out), overwrite=overwrite)
        notes = tuple(
            filter(
                None,
                (
                    "" if tokenizer is not None else NO_TOKENIZER,
                    source.beside.note(kept=True),
                    "" if report.plan.kv_precision == "source" else ONLY_KV,
                ),
            )
        )
        return _fit_unchanged(
            source, Path(out), report, notes=notes, overwrite=overwrite, fresh=fresh
        )
    _require_memory(report, asked)
    planned = report.plan.chosen
    check_reach(source.config, anatomy, asked.method, planned.rate, planned.scope)
    target = torch.device(
        "cuda" if torch.cuda.is_available() and asked.request.device != "cpu" else "cpu"
    )
    settings = {
        **asked.request.to_json(),
        "model": source.identity["id"],
        "calibration": text.sha256,
        "seed": seed,
        "computed_in": str(compute_dtype(target, getattr(torch, anatomy.dtype))),
        "passes": passes,
        "keep_vision": keep_vision,
        "version": __version__,
    }
    fetching = report.fetching
    scratch = report.plan.scratch_bytes if fetching is None else fetching.scratch_bytes
    needed = report.plan.disk_bytes + scratch
    if passes > 1:
        needed += trial_bytes(anatomy, report.scopes_tried)
    require_space(Path(out), needed)
    if keep_source and source.ranges is not None:
        _require_cache(source, needed if _on_one_disk(folder, Path(out)) else 0)
    train, held_out = token_sets(
        text,
        tokenizer,
        length=min(SEQUENCE_LENGTH, anatomy.max_context),
        tokens=asked.request.tokens,
        held_out_tokens=asked.request.tokens // HELD_OUT_SHARE,
        seed=seed,
    )
    with StagedFolder(Path(out), settings, overwrite=overwrite, fresh=fresh) as staged:
        report = _same_plan(staged.work / PLAN_FILE, report)
        decided = report.plan.without_measurements()
        if keep_source:
            source = _downloaded(source)
        places = MatchPlaces(held_out, tokenizer)
        job = Job(
            source, asked.request, decided, train, held_out, target, __version__, passes, places
        )
        run = Consolidation(job, staged.path, staged.work, tell)
        manifest = run.run()
        with run.state.clock.part("cache"):
            report = replace(report, plan=with_scope(report.plan, run.state.job.scope))
            manifest = planned_caching(staged.path, manifest, decided.left_for_prototypes)

            def tuned(budget: Budget) -> Manifest:
                return planned_prefetch(
                    staged.path,
                    manifest,
                    run.predictions(),
                    stored(anatomy, decided.dense_precision),
                    budget,
                    decided.left_for_prototypes,
                )

            measured, manifest = tuned(report.plan.budget), tuned(decided.budget)
        started = time.perf_counter()
        tell(Progress("verify", 0, 1, "package"))
        saved = save_manifest(staged.path, manifest)
        save_machine_file(staged.path, saved, report.plan, measured)
        verify_package(staged.path)
        staged.commit()
        run.state.clock.add("verify", time.perf_counter() - started)
        written = sum(facts["size"] for facts in manifest.files.values())
        if not asked.request.equal:  # how widths were forced is no part of what is kept
            _remember(source.identity["id"], report.plan, manifest, text.sha256)
        return FitReport(
            staged.target,
            report,
            manifest.receipt,
            run.state.clock.seconds,
            run.state.resumed_from,
            written,
            manifest.notes,
            _division(manifest, anatomy),
        )


def _require_memory(report: PlanReport, asked: Resolved) -> None:
    """Refuse where this machine, with nothing else on it, has less RAM than the fit takes."""
    need, limit = report.memory, measure_machine().ram_limit
    if need is None or need.nbytes <= limit:
        return
    tokens = most_tokens(
        limit, asked.request.tokens, lambda count: memory_of_fit(report, asked, count)
    )
    raise OutOfMemory(
        f"This machine has too little RAM to fit {report.source_name}.",
        f"about {human_size(need.nbytes)} are needed, it has {human_size(limit)}",
        f"--calibration-tokens {tokens}"
        if tokens
        else "Fit it on a larger machine; the package runs on this one.",
    )


def _division(manifest: Manifest, anatomy: ModelAnatomy) -> tuple[Division, ...]:
    transposed = any(one.experts.transposed for one in anatomy.moe_layers if one.experts)
    return division_of(manifest, transposed=transposed)


def _downloaded(
    source: OpenedModel, out: Path | None = None, *, overwrite: bool = False
) -> OpenedModel:
    """The same model with all of its weights in the hub's cache; nothing is fetched where ``out`` may not be written.

    Raises:
        NoSpace, OutputExists: before the first byte.
        CheckpointError: another model came.
    """
    from conmoe_edge.model.opened import open_model

    if source.ranges is None:
        return source
    if out is not None:
        with StagedFolder(out, {"unchanged": source.identity["id"]}, overwrite=overwrite) as staged:
            staged.discard()
    _require_cache(source)
    assert source.revision is not None
    hub_id = source.ranges.hub_id
    found = open_model(locate(hub_id, revision=source.revision), keep_vision=source.keeps_vision)
    if found.identity != source.identity:
        raise CheckpointError(
            f"{hub_id} has changed on the hub while it was read.",
            differs(source.identity, found.identity),
            "Run the same command again.",
        )
    return found


def _on_one_disk(one: Path, other: Path) -> bool:
    return existing_parent(one).stat().st_dev == existing_parent(other).stat().st_dev


def _require_cache(source: OpenedModel, beside: int = 0) -> None:
    """Refuse where the hub's cache has no room for the weights and for so many bytes ``beside`` them."""
    try:
        require_space(source.folder, source.index.total_bytes + beside)
    except NoSpace as error:
        free = "Free some space, or name a cache on another disk with HF_HOME."
        raise NoSpace(
            "The disk of the hub's cache has too little free space.", error.why, free
        ) from error


def _tokenizer(tried: Any, *, unchanged: bool, may_lack: bool) -> Any:
    """The model's tokenizer of ``tried_tokenizer``; ``None`` where it has none and may lack it.

    Raises:
        CalibrationError: it has none.
    """
    if not isinstance(tried, CalibrationError):
        return tried
    if unchanged and may_lack:
        return None
    if unchanged:
        fix = f"{tried.fix}; --no-tokenizer writes a package that cannot chat"
        raise CalibrationError(tried.what, tried.why, fix) from tried
    why = "without one the calibration text is no tokens"
    raise CalibrationError(tried.what, f"{tried.why}; {why}", tried.fix) from tried


def _same_plan(path: Path, report: PlanReport) -> PlanReport:
    """The plan that an unfinished run began with: free memory may have changed since, the package must not."""
    from conmoe_edge.checkpoint.fs.atomic_files import write_json
    from conmoe_edge.checkpoint.tensors.tensor_index import read_json_object

    if path.is_file():
        return replace(report, plan=plan_from_json(read_json_object(path)))
    write_json(path, plan_to_json(report.plan))
    return report


def _fit_unchanged(
    source: OpenedModel,
    out: Path,
    report: PlanReport,
    *,
    notes: tuple[str, ...],
    overwrite: bool,
    fresh: bool,
) -> FitReport:
    """The model fits as it is: link it, say so, and change nothing."""
    from conmoe_edge.offload.simulate.machine_file import save_machine_file

    settings = {"unchanged": source.identity["id"]}
    with StagedFolder(out, settings, overwrite=overwrite, fresh=fresh) as staged:
        written = link_model(source.index, staged.path)
        manifest = Manifest(
            source=source.to_json(),
            method=UNCHANGED,
            rate=0.0,
            scope=1,
            precision="source",
            layouts=(),
            prototypes=(),
            slots={},
            files={file.name: file.entry() for file in sorted(written, key=lambda file: file.name)},
            plan=plan_to_json(report.plan.without_measurements()),
            tool_version=__version__,
            prefill_chunk=report.plan.prefill_chunk,
            kv_precision=report.plan.kv_precision,
            notes=notes,
        )
        saved = save_manifest(staged.path, manifest)
        save_machine_file(staged.path, saved, report.plan, manifest)
        verify_package(staged.path)
        staged.commit()
        size = sum(file.size for file in written)
        return FitReport(staged.target, report, {}, {}, 0, size, notes)


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
            kv_precision=plan.kv_precision,
            wide_prototypes=chosen.wide_prototypes,
            pool_bytes=chosen.pool_bytes,
            loss_rise=receipt["loss_consolidated"] - receipt["loss_original"],
            kl=receipt["kl"],
            tokens=receipt["tokens"],
            calibration=calibration,
            version=__version__,
            bits=chosen.bits,
        )
    )
