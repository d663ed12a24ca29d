"""The first phase: everything of a package that is not a routed expert.

Peak memory: one tensor. Raises ``NoSpace``; ``CheckpointError`` for a tensor that cannot be read.
"""

from __future__ import annotations

from conmoe_edge.checkpoint.format.manifest import FORMAT_VERSION
from conmoe_edge.checkpoint.fs.atomic_files import write_json
from conmoe_edge.checkpoint.package.sidefiles import copy_side_files
from conmoe_edge.checkpoint.tensors.tensor_index import read_json_object
from conmoe_edge.checkpoint.tensors.tensor_reader import ShardReader
from conmoe_edge.checkpoint.tensors.tensor_writer import write_dense
from conmoe_edge.compress.run.job import Progress
from conmoe_edge.compress.run.state import Run
from conmoe_edge.compress.stream.dense_conversion import dense_sources


def prepare(run: Run, reader: ShardReader) -> None:
    run.progress(Progress("write", 0, run.layers, "dense weights"))
    model = run.streamed(reader)
    dense = [
        key
        for layer in (None, *range(run.layers))
        for key in (model.outside_keys if layer is None else model.layer_keys(layer))
        if key not in model.expert_keys
    ]
    with run.clock.part("write"):
        for written in write_dense(run.package, dense_sources(reader, dense, run.in_int8(model))):
            run.note(written)
        for written in copy_side_files(run.job.index.folder, run.package):
            run.note(written)
        config = read_json_object(run.job.index.folder / "config.json")
        config.pop("auto_map", None)  # names of code that is never run
        config["quantization_config"] = {
            "quant_method": "conmoe",
            "format_version": FORMAT_VERSION,
        }
        run.note(write_json(run.package / "config.json", config))
    run.save("calibrate", 0)
