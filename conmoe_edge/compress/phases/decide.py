"""A scope is decided, and its prototypes are written, when its last layer has run.

Before that the experts of its earlier layers wait in the run's work folder, as records.

Peak memory: the scope's last layer, and what the method takes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor, nn

from conmoe_edge.checkpoint.format.forms import SCALE
from conmoe_edge.checkpoint.format.layout import make_layout
from conmoe_edge.checkpoint.format.manifest import ExpertId, RecordLayout
from conmoe_edge.checkpoint.fs.atomic_files import WrittenFile
from conmoe_edge.checkpoint.package.record_headers import record_name
from conmoe_edge.checkpoint.package.slot_constants import write_constants
from conmoe_edge.compress.methods.few_bits import feeds_back
from conmoe_edge.compress.methods.interface import Decision, LayerView, Parts, ScopeView
from conmoe_edge.compress.methods.rounded_prototypes import RoundedPrototypes
from conmoe_edge.compress.quality.slot_overview import slot_distances
from conmoe_edge.compress.run.journal import StoredRecord
from conmoe_edge.compress.run.state import Run
from conmoe_edge.compress.solvers.weight_distance import distances
from conmoe_edge.compress.stats.layer_tokens import LayerTokens
from conmoe_edge.compress.stats.mixed_precision import gains, load_sample, widest
from conmoe_edge.compress.stats.statistics import OutputVectors
from conmoe_edge.compress.stream.scope_weights import (
    LayerWeights,
    LoadedLayer,
    ScopeWeights,
    ScratchLayer,
    matrix_views,
    write_experts,
)
from conmoe_edge.model.router import Router
from conmoe_edge.plan.levers import record_parts


@dataclass(frozen=True, slots=True)
class Entered:
    """The package's stream in front of the experts of a layer.

    Attributes:
        tokens: that enter them, with the slots that the router chooses.
        before: [N, T, H], the stream without the experts, where the layer adds their output to what it gives without
            them; ``None`` elsewhere (a norm comes after the experts).
    """

    tokens: LayerTokens
    before: Tensor | None


Entering = Callable[[Sequence[bool] | None], Entered]
"""Brings the package's stream in front of a layer's experts, with one flag a router slot where its router is kept from
some.
"""


def decide(
    run: Run,
    module: nn.Module,
    index: int,
    tokens: LayerTokens | None,
    routers: Callable[[], Mapping[int, Router]],
    entering: Entering | None,
) -> tuple[Entered | None, Tensor | None]:
    """At the last layer of a scope: decide and write its prototypes. Before that: keep the layer's experts.

    Args:
        run: its journal and work folder get what is decided.
        module: the layer's loaded experts.
        index: the decoder layer.
        tokens: of the layer, where the method or rounding needs them.
        routers: asked where the method changes what they may choose.
        entering: where the calibration text goes through the layers as they were written, too.

    Returns:
        What ``entering`` gave; and ``Decision.left`` where it holds for what was written, too (``_as_solved``).
    """
    scope, experts = run.sizes.scope_of(index), run.sizes.experts(index)
    source = make_layout(record_parts(experts, "source"), "source")
    here = LoadedLayer(module)
    if index != scope[-1]:
        with run.clock.part("write"):
            write_experts(
                run.work.experts(index),
                [(expert, source) for expert in run.sizes.pool((index,))],
                ScopeWeights({index: here}, matrix_views(module)).parts,
                transposed=experts.transposed,
            )
            if tokens is not None:
                tokens.save(run.work.tokens(index))
        return None, None
    earlier = [ScratchLayer(run.work.experts(layer), source) for layer in scope[:-1]]
    layers: dict[int, LayerWeights] = {index: here, **dict(zip(scope[:-1], earlier, strict=True))}
    weights = ScopeWeights(layers, matrix_views(module))
    view = _view(run, scope, weights, module, tokens, routers)
    with run.clock.part("method"):
        decision = run.method.decide(view, run.sizes.count(scope, run.journal.budgets))
    parts = weights.parts if decision.parts is None else decision.parts
    with run.clock.part("precision"):
        kinds = _kinds_of(run, scope, view, decision, parts)
    entered = None if entering is None else entering(_open_in(decision, index))
    widths = {one: decision.widths.get(one, view.widths[-1]) for one in kinds}
    layouts = {one: run.sizes.layout(index, kind, widths[one]) for one, kind in kinds.items()}
    rounded = _rounded(run, scope, view, decision, layouts, entered, tokens)
    written = _write(run, scope, layouts, parts, rounded)
    for one, kind in kinds.items():
        offset = written.offsets[record_name(one)]
        run.journal.store(one, StoredRecord(written.name, offset, kind, widths[one]))
    if rounded is not None:
        decision = rounded.decision()
    with run.clock.part("distance"):
        run.journal.distances.update(slot_distances(view.pool, decision.slots, weights))
    _keep(run, scope, view.pool, decision)
    for layer in earlier:
        layer.close()
    return entered, decision.left if _as_solved(decision, kinds, layouts) else None


def _open_in(decision: Decision, layer: int) -> list[bool] | None:
    """One flag a router slot of a layer whose router is kept from some; the layer is its scope's only one."""
    if layer not in decision.rerouted:
        return None
    return [not slot.dropped for slot in decision.slots]


def _as_solved(
    decision: Decision, kinds: Mapping[ExpertId, str], layouts: Mapping[ExpertId, RecordLayout]
) -> bool:
    """Whether the method has solved with what was written: records in the checkpoint's own numbers, which round so
    little, or weights that it has rounded itself.
    """

    def solved(one: ExpertId) -> bool:
        named = [part.name for part in layouts[one].parts]
        rounded = {name.removesuffix(SCALE) for name in named if name.endswith(SCALE)}
        made = decision.made.get(one, {})
        return kinds[one] == "source" or (bool(rounded) and rounded <= made.keys())

    return all(solved(one) for one in decision.prototypes)


def _rounded(
    run: Run,
    scope: Sequence[int],
    view: ScopeView,
    decision: Decision,
    layouts: Mapping[ExpertId, RecordLayout],
    entered: Entered | None,
    tokens: LayerTokens | None,
) -> RoundedPrototypes | None:
    """The prototypes as error feedback rounds them; ``None`` where no record has a form for that."""
    if not any(feeds_back(layout) for layout in layouts.values()):
        return None
    last = scope[-1]
    came: dict[int, LayerTokens] = {}
    if entered is not None:
        came[last] = replace(entered.tokens, target=None, start=None).weighted()
    else:
        assert tokens is not None, "what is rounded needs the tokens"
        came = {layer: LayerTokens.load(run.work.tokens(layer)) for layer in scope[:-1]}
        came[last] = tokens
    return RoundedPrototypes(view, decision, layouts, came)


def _view(
    run: Run,
    scope: Sequence[int],
    weights: ScopeWeights,
    module: nn.Module,
    tokens: LayerTokens | None,
    routers: Callable[[], Mapping[int, Router]],
) -> ScopeView:
    """What the method sees of a scope."""
    needs, last, sizes = run.method.needs, scope[-1], run.sizes
    statistics = run.journal.statistics_of(scope)
    selections = {}
    if run.method.reroutes:
        selections = {layer: router.selection for layer, router in routers().items()}

    def measure() -> Tensor:
        with run.clock.part("distance"):
            return distances(weights)

    def layer_view(layer: int) -> LayerView:
        earlier = layer != last and needs.tokens
        return LayerView(
            layer,
            sizes.experts(layer).count,
            sizes.experts(layer).top_k,
            statistics[layer],
            LayerTokens.load(run.work.tokens(layer)) if earlier else tokens,
            OutputVectors.load(run.work.vectors(layer)) if needs.vectors else None,
            selections.get(layer),
        )

    def layout_of(width: int, kind: str = "") -> RecordLayout:
        return sizes.layout(last, kind or sizes.kinds[0], width)

    return ScopeView(
        sizes.pool(scope),
        tuple(layer_view(layer) for layer in scope),
        weights,
        measure,
        module,
        sizes.widths(last),
        sizes.sizes(last),
        sizes.room(scope, run.journal.budgets, run.journal.stored()) if sizes.differs else 0,
        run.dtype,
        run.job.device,
        _may_add(run, last),
        layout_of if sizes.alike or sizes.free else None,
        sizes.options(last),
        sizes.gone(last),
    )


def _may_add(run: Run, layer: int) -> bool:
    """Whether slots may add constants: where a plain checkpoint is made of the package, a bias has to hold them."""
    names = {part.name for part in run.sizes.experts(layer).parts}
    return not run.sizes.every or "down_proj_bias" in names


def _kinds_of(
    run: Run,
    scope: Sequence[int],
    view: ScopeView,
    decision: Decision,
    parts: Callable[[ExpertId], Parts],
) -> dict[ExpertId, str]:
    """The kind of record of each prototype: in a mixed precision the wide one where it helps most."""
    if decision.kinds:
        return {one: decision.kinds[one] for one in decision.prototypes}
    if run.sizes.alike:
        return dict.fromkeys(decision.prototypes, run.sizes.kinds[0])
    wide, narrow = run.sizes.kinds
    count = run.sizes.wide_count(scope, run.journal.budgets)
    if count in (0, len(decision.prototypes)):
        return dict.fromkeys(decision.prototypes, wide if count else narrow)
    layout_of, width = run.sizes.layout, view.widths[-1]
    found = gains(
        view.module,
        decision.prototypes,
        decision.slots,
        view.pool,
        {layer: load_sample(run.work.sample(layer)) for layer in scope},
        parts,
        (layout_of(scope[0], wide, width), layout_of(scope[0], narrow, width)),
        run.dtype,
        run.job.device,
    )
    chosen = widest(found, count)
    return {
        expert: wide if position in chosen else narrow
        for position, expert in enumerate(decision.prototypes)
    }


def _write(
    run: Run,
    scope: Sequence[int],
    layouts: Mapping[ExpertId, RecordLayout],
    parts: Callable[[ExpertId], Parts],
    rounded: RoundedPrototypes | None,
) -> WrittenFile:
    """The prototypes of a scope as records of the package."""
    with run.clock.part("write"):
        written = write_experts(
            run.package / prototypes_file(scope[0]),
            list(layouts.items()),
            parts if rounded is None else rounded.parts,
            transposed=run.sizes.experts(scope[-1]).transposed,
            made=None if rounded is None else rounded.made,
        )
    run.journal.add_files([written])
    return written


def _keep(run: Run, scope: Sequence[int], pool: Sequence[ExpertId], decision: Decision) -> None:
    """Router slots and notes into the journal, constants beside it."""
    for layer, constants in sorted(decision.constants.items()):
        write_constants(run.work.constants(layer), {layer: constants})
    for layer in scope:
        slots = zip(pool, decision.slots, strict=True)
        run.journal.decide(layer, [slot for expert, slot in slots if expert.layer == layer])
    for layer in sorted(decision.rerouted):
        run.journal.rerouted[str(layer)] = True
    run.journal.notes += [note for note in decision.notes if note not in run.journal.notes]


def prototypes_file(layer: int) -> str:
    """The package's file with the prototypes of the scope that begins with ``layer``."""
    return f"prototypes-{layer:05d}.safetensors"
