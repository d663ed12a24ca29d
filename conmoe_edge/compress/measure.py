"""The last phase: the written package, layer by layer over the held-out text, beside the original.

Peak memory: one decoder layer without its experts, the prototypes of that layer, one batch of
activations, then the logits of one sequence twice.
"""

from __future__ import annotations

import time
from typing import Any

from conmoe_edge.checkpoint.index import CheckpointIndex, index_files
from conmoe_edge.checkpoint.reader import ShardReader
from conmoe_edge.compress.dense import Dequantised
from conmoe_edge.compress.receipt import ReceiptTracker
from conmoe_edge.compress.run import Run
from conmoe_edge.compress.stream import Stream, run_layer, sequence_logits
from conmoe_edge.compress.taps import RoutedTap, attach
from conmoe_edge.model.streaming import StreamedModel


def measure(run: Run) -> None:
    """Into the journal."""
    index = CheckpointIndex.open(run.package)
    files = sorted({file for file, _, _ in run.journal.records.values()})
    records = index_files(run.package, files)
    with ShardReader(index) as dense, ShardReader(records) as prototypes:
        package = run.streamed(Dequantised(dense))
        if any(run.journal.rerouted.values()):
            package.routers()  # looked for while nothing is loaded
        streams = run.open_streams(package, {"held_out": run.job.held_out}, "receipt")
        for layer in range(run.journal.done, run.layers):
            run.announce("receipt", layer)
            with run.loaded(package, layer, with_experts=False):
                tap = None
                if layer in package.experts:
                    with run.clock.part("read"):
                        tap = run.mapped(layer, prototypes)
                    attach(package.experts[layer][1], tap)
                start = time.perf_counter()
                with run.rerouting(package, layer):
                    run_layer(package, layer, streams["held_out"], tap, "the package")
                run.clock.add("receipt", time.perf_counter() - start)
                if tap is not None:
                    attach(package.experts[layer][1], RoutedTap())
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
    tokens = run.job.held_out
    tracker = ReceiptTracker(tokens)
    with ShardReader(run.job.index) as reader:
        original = package
        if run.job.dense_precision != "source":
            original = run.streamed(reader)
            original.load_outside()
        for row in range(tokens.ids.shape[0]):
            before = sequence_logits(original, tokens, hidden, row)
            tracker.add(row, before, sequence_logits(package, tokens, after.hidden, row))
    return tracker.result()
