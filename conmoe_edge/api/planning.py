"""``plan``: where a model is, what it looks like, what the machine gives, what would be done."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from conmoe_edge.api.shared import CALIBRATION_TOKENS, anatomy_of
from conmoe_edge.checkpoint.sources.locate import describe
from conmoe_edge.checkpoint.tensors.fingerprint import fingerprint
from conmoe_edge.checkpoint.tensors.tensor_index import CheckpointIndex
from conmoe_edge.errors import ConmoeError
from conmoe_edge.memory.bandwidth import Meter
from conmoe_edge.memory.outcomes import Outcome, recall
from conmoe_edge.memory.resolve import resolve_budget
from conmoe_edge.model.anatomy import ModelAnatomy
from conmoe_edge.plan.advice import advise
from conmoe_edge.plan.plan import Plan, Preference
from conmoe_edge.plan.planner import make_plan
from conmoe_edge.plan.serialise import plan_to_json
from conmoe_edge.plan.width_levers import Widths, check_widths

if TYPE_CHECKING:
    pass


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
class Levers:
    """What the caller asked of the plan; ``trims``: the method removes neurons as well, ``equal``: from all
    prototypes alike.
    """

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
    equal: bool = False

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
            equal=self.equal,
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
    widths: Widths = "free",
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
        widths: ``equal`` gives every prototype of a method that trims (``auto``) the same number of neurons.
        method: consolidation method; by default ``auto``, or ``conmoe`` where ``scope`` is more than one layer.
        revision: branch, tag or commit of a hub model.
        offline: open no socket.

    Raises:
        DoesNotFit: nothing meets the budget; says the smallest one that works.
        ModelNotFound, CheckpointError, UnsupportedModel, UsageError: as their names say.
    """
    from conmoe_edge.compress.methods.resolve_method import asked_method
    from conmoe_edge.model.bridge import read_config

    asked = asked_method(method, scope, precision)
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
    found = describe(model, revision=revision, offline=offline)
    headers = {name: (header.dtype, header.nbytes) for name, header in found.tensors.items()}
    anatomy = anatomy_of(read_config(str(found.path)), headers)
    name = found.hub_id or found.name
    decided = levers.plan(anatomy, Path())
    return PlanReport(
        name, anatomy, decided, asked.method.name, asked.note, outcomes_of(found.path)
    )


def outcomes_of(folder: Path) -> tuple[Outcome, ...]:
    """What earlier fits of the model in ``folder`` cost; nothing where its weights are not there."""
    try:
        index = CheckpointIndex.open(folder)
        return recall(fingerprint(index, (folder / "config.json").read_bytes())["id"])
    except (ConmoeError, OSError):
        return ()
