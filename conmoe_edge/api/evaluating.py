"""``evaluate``: how good a package or a model is on text, beside another one. Both are streamed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from conmoe_edge.checkpoint.format.manifest import UNCHANGED, Manifest
from conmoe_edge.checkpoint.sources.locate import Source, locate
from conmoe_edge.errors import UsageError
from conmoe_edge.memory.budget import DeviceWord
from conmoe_edge.model.tokenizers import tokenizer_of
from conmoe_edge.plan.kv_precision import check_kv_precision
from conmoe_edge.plan.request import CALIBRATION_TOKENS, HELD_OUT_SHARE, SEQUENCE_LENGTH

if TYPE_CHECKING:
    from conmoe_edge.compress.quality.evaluation import Folder
    from conmoe_edge.compress.quality.metrics import Cost, EvaluationReport
    from conmoe_edge.compress.run.job import OnProgress

CONTINUATIONS, PROMPT_TOKENS, CONTINUATION_TOKENS = 6, 64, 48


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
    kv_precision: str | None = None,
    device: DeviceWord = "auto",
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
        kv_precision: how keys and values of ``model`` are kept, as of ``load``; by default as the package says.
            Every token sees the numbers that the cache would hold.
        device: where to compute.
        revision: branch, tag or commit, where ``model`` is on the hub.
        offline: open no socket.
        on_cost: called before anything is computed.
        progress: called on the way.

    Raises:
        CheckpointError: a model is damaged, or the package's source has changed.
        CalibrationError: the text cannot be read or is too short.
        UsageError: the two have different tokenizers.
        UnsupportedModel: keys and values of the model have no form in 8 bits.
    """
    import torch

    from conmoe_edge.compress.quality.evaluation import Settings, described, manifest_of
    from conmoe_edge.compress.quality.evaluation import evaluate as measured
    from conmoe_edge.compress.quality.metrics import EvaluationReport
    from conmoe_edge.compress.run.job import Progress
    from conmoe_edge.compress.stream.calibration_text import bundled_text, read_text
    from conmoe_edge.memory.machine import measure_machine
    from conmoe_edge.model.bridge import read_config
    from conmoe_edge.model.probe import longest_in

    check_kv_precision(kv_precision)
    tell = progress or (lambda step: None)
    words = read_text(Path(text), "--text", "text") if text is not None else bundled_text()
    if min(tokens, sequence_length) < 2 or (
        continuations and min(prompt_tokens, continuation_tokens) < 1
    ):
        raise UsageError(
            "There is nothing to measure.",
            "tokens and their sequences need two at least, prompts and continuations one",
            "--tokens 8192 --sequence-length 512, say",
        )
    tell(Progress("locate", 0, 1, str(model)))
    ours = locate(str(model), revision=revision, offline=offline)
    manifest = manifest_of(ours.path)
    theirs, is_origin, alone = _reference(manifest, against, offline=offline)
    one = _measured(ours)
    other = None if theirs is None else _measured(theirs)
    where = torch.device("cuda" if torch.cuda.is_available() and device != "cpu" else "cpu")
    free = (
        torch.cuda.mem_get_info(where)[0] if where.type == "cuda" else measure_machine().ram_usable
    )
    config = read_config(ours.path) if one.model is None else one.model.config
    longest = longest_in(config.get_text_config()) or 1 << 20
    settings = Settings(
        tokens=tokens,
        sequence_length=min(sequence_length, longest),
        seed=seed,
        continuations=continuations,
        prompt_tokens=max(1, min(prompt_tokens, longest - continuation_tokens)),
        steps=min(continuation_tokens, longest - 1),
        device=where,
        free_memory=free,
        kv_precision=kv_precision,
    )
    figures, continued, cost, seconds = measured(
        one, other, words, settings, on_cost=on_cost, progress=tell
    )
    sizes = [_experts_bytes(folder) for folder in (one, other) if folder is not None]
    return EvaluationReport(
        model=described(one, sizes[0], kv_precision=kv_precision),
        reference=None if other is None else described(other, sizes[1], is_origin),
        quality=figures.quality,
        per_domain=figures.per_domain,
        exact_match=figures.exact_match,
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


def _reference(
    manifest: Manifest | None, against: str | Path | None, *, offline: bool
) -> tuple[Source | None, bool | None, str]:
    """What a model is compared with, whether a package was made from it, and if nothing, why."""
    from conmoe_edge.checkpoint.sources.origin import differs, find_origin, fingerprint_of
    from conmoe_edge.compress.quality.evaluation import manifest_of

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


def _measured(source: Source) -> Folder:
    """A model to measure; one in GGUF files is opened here, since its folder holds no weights."""
    from conmoe_edge.compress.quality.evaluation import Folder
    from conmoe_edge.model.opened import open_model

    tokenizer = tokenizer_of(source.path, source.gguf)
    opened = None if source.gguf is None else open_model(source)
    return Folder(source.name, source.path, tokenizer, opened)


def _experts_bytes(measured: Folder) -> int:
    """Bytes of the routed experts of a plain model in a folder."""
    from conmoe_edge.checkpoint.quantised.stored import stored_in
    from conmoe_edge.checkpoint.tensors.tensor_index import CheckpointIndex
    from conmoe_edge.compress.quality.evaluation import manifest_of
    from conmoe_edge.model.probe import probe
    from conmoe_edge.model.source_facts import read_source

    if measured.model is not None:
        return measured.model.anatomy.experts_bytes
    folder = measured.path
    manifest = manifest_of(folder)
    if manifest is not None and manifest.method != UNCHANGED:
        return 0
    index = CheckpointIndex.open(folder)
    source = read_source(folder, stored_in(index), index.bytes_of)
    return probe(source.config, source.facts).experts_bytes
