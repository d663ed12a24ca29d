"""The first phase: everything of a package that is not a routed expert.

Peak memory: one tensor. Raises ``NoSpace``; ``CheckpointError`` for a tensor that cannot be read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from conmoe_edge.checkpoint.format.manifest import FORMAT_VERSION
from conmoe_edge.checkpoint.fs.atomic_files import WrittenFile, write_json
from conmoe_edge.checkpoint.package.sidefiles import copy_side_files
from conmoe_edge.checkpoint.tensors.tensor_index import CONFIG_FILE
from conmoe_edge.checkpoint.tensors.tensor_reader import Lazy
from conmoe_edge.checkpoint.tensors.tensor_writer import write_dense
from conmoe_edge.compress.phases.dense import DenseForms
from conmoe_edge.compress.stream.dense_conversion import dense_sources
from conmoe_edge.model.config_json import read_to_write
from conmoe_edge.model.streaming import StreamedModel


def prepare(
    model: StreamedModel,
    tensors: Mapping[str, Lazy],
    folder: Path,
    package: Path,
    forms: DenseForms,
    beside: Sequence[str] = (),
) -> list[WrittenFile]:
    """Write dense weights, side files and ``config.json`` of ``model`` into ``package``.

    ``tensors`` are those of the whole model, whose small files lie in ``folder``; those named ``beside`` it are
    written as well. Matrices that ``forms`` has for later are not.
    """
    keys = [*model.outside_keys]
    for layer in range(len(model.layers)):
        keys += model.layer_keys(layer)
    left_out = model.expert_keys | forms.later
    dense = [key for key in keys if key not in left_out]
    written = [*write_dense(package, dense_sources(tensors, [*dense, *beside], forms.at_once))]
    written += copy_side_files(folder, package)
    config = read_to_write(folder, CONFIG_FILE)  # without names of code
    config["quantization_config"] = {"quant_method": "conmoe", "format_version": FORMAT_VERSION}
    return [*written, write_json(package / CONFIG_FILE, config)]
