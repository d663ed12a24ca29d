"""The plugin through which vLLM runs a package as it is: ``vllm serve ./out``, ``vllm.LLM("./out")``.

vLLM calls ``register`` in every process it starts (entry point ``vllm.general_plugins``). A package names itself
in its ``config.json`` (``quant_method: "conmoe"``), and a quantization method is where vLLM lets a plugin say
what the weights of its routed experts are: how many there are, where they come from, and what is computed with the
chosen experts. So the router, attention and everything else are vLLM's own for every architecture; this package
brings

- ``layer_stacks.py``: what each router slot of a layer stands for, and what cannot be served; no vLLM, no torch,
- ``stacked_weights.py``: records and maps into the tensors of a layer, the part of one rank; no vLLM,
- ``plugin.py``: vLLM's two classes.

Importing this file costs nothing. docs/cluster.md has the commands.
"""

from __future__ import annotations


def register() -> None:
    """Make vLLM know packages; calling it again does nothing."""
    # Importing this package has named DeepSeek V1 to transformers, whose config classes vLLM reads.
    from conmoe_edge.integrations.vllm.plugin import register_quantization

    register_quantization()
