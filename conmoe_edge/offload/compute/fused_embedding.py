"""A table of embeddings in fewer bits: the rows of the tokens are looked up and expanded, nothing else is.

``QuantisedEmbedding`` stands where transformers has ``nn.Embedding``. A head that shares its numbers is a
``FusedLinear`` with the same values and scales. Memory: the table as it is stored, and the rows of one forward in fp32.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from conmoe_edge.checkpoint.format.forms import Kind
from conmoe_edge.offload.compute.stored_weight import StoredWeight, room_for


class QuantisedEmbedding(nn.Embedding):
    """The rows of a stored matrix [V, H] by their numbers, for inference only.

    ``weight`` holds the values and ``weight_scale`` the scales (``quantise.py``).
    """

    weight_scale: Tensor

    def __init__(self, like: nn.Embedding, kind: Kind) -> None:
        """Take the place of ``like`` on the meta device, with room for its rows as ``kind``."""
        nn.Module.__init__(self)
        self.num_embeddings, self.embedding_dim = like.num_embeddings, like.embedding_dim
        self.padding_idx, self.max_norm, self.norm_type = like.padding_idx, None, like.norm_type
        self.scale_grad_by_freq = self.sparse = False
        self.dtype = like.weight.dtype
        values, scales = room_for(like.num_embeddings, like.embedding_dim, kind)
        self.weight = values
        # No parameter: the first one in floating point would be taken for the model's own format.
        self.register_buffer("weight_scale", scales)
        self.stored = StoredWeight(kind)

    def forward(self, input: Tensor) -> Tensor:
        """[...] numbers of rows -> [..., H] in the format of the model.

        Raises:
            IndexError: a number that no row has.
        """
        with torch.no_grad():
            matrix = self.stored.matrix(self.weight, self.weight_scale)
            found = matrix.look_up(input.reshape(-1)).to(self.dtype)
        return found.view(*input.shape, self.embedding_dim)
