"""The last phase: the written package, layer by layer over the held-out text, beside the original.

Peak memory: one decoder layer without its experts, the prototypes of that layer, one batch of
activations, then the logits of one sequence twice.
"""

from __future__ import annotations

import time
from typing import Any

from conmoe_edge.checkpoint.tensors.tensor_index import CheckpointIndex, index_files
from conmoe_edge.checkpoint.tensors.tensor_reader import ShardReader
from conmoe_edge.compress.quality.receipt import compare_heads
from conmoe_edge.compress.run.state import Run
from conmoe_edge.compress.stream.dense_conversion import Dequantised
from conmoe_edge.compress.stream.layer_stream import Stream
from conmoe_edge.compress.stream.streamed_model import Subject
from conmoe_edge.model.streaming import StreamedModel


def measure(run: Run) -> None:
    """Into the journal."""
    index = CheckpointIndex.open(run.package)
    files = sorted({file for file, *_ in run.journal.records.values()})
    records = index_files(run.package, files)
    with ShardReader(index) as dense, ShardReader(records) as prototypes:
        package = run.streamed(Dequantised(dense))
        subject = Subject(
            package,
            lambda layer: run.mapped(layer, prototypes),
            "the package",
            closed={
                layer: is_open
                for layer in package.experts
                if (is_open := run.open_slots(layer)) is not None
            },
        )
        streams = run.open_streams(package, {"held_out": run.job.held_out}, "receipt")
        for layer in range(run.journal.done, run.layers):
            run.announce("receipt", layer)
            with subject.layer(layer, run.clock):
                start = time.perf_counter()
                subject.advance(layer, streams["held_out"])
                run.clock.add("receipt", time.perf_counter() - start)
            run.layer_done("receipt", layer, streams)
        with run.clock.part("read"):
            package.load_outside()
        with run.clock.part("receipt"):
            run.journal.receipt = _compare(run, package, streams["held_out"])
    run.save("done", 0)
    run.journal.drop_hidden("receipt", run.layers)


def _compare(run: Run, package: StreamedModel, after: Stream) -> dict[str, Any]:
    """The hidden states of both through norm and head: the original's, and the package's.

    Where nothing dense is quantised these are the same bytes, and are loaded once.
    """
    hidden = run.journal.load_hidden("original", 0)["held_out"]
    with ShardReader(run.job.index) as reader:
        original = package
        if run.job.dense_precision != "source":
            original = run.streamed(reader)
            original.load_outside()
        return compare_heads(original, hidden, package, after.hidden, run.job.held_out)
