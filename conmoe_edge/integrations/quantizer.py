"""The quantizer ``conmoe``: how ``from_pretrained`` opens a package.

``attach.py`` does the work, before and after transformers loads the dense weights. transformers imports this file while
it is being imported itself, so the top has its two base classes and nothing that needs more of it.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from conmoe_edge.errors import UsageError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

_LOG = logging.getLogger(__name__)


class ConmoeConfig(QuantizationConfigMixin):
    """``quantization_config`` in a package's ``config.json``. All else is in ``conmoe.json``."""

    def __init__(
        self, quant_method: str = "conmoe", format_version: int = 1, **unknown: Any
    ) -> None:
        """``unknown`` are fields of later formats. The manifest's version decides whether the package can be read."""
        self.quant_method = quant_method  # type: ignore[assignment]
        self.format_version = format_version


class ConmoeQuantizer(HfQuantizer):
    """Opens a package. Budget, device and context come from ``load_options``, or from the package's plan."""

    def __init__(self, quantization_config: QuantizationConfigMixin, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._loading: Any = None

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Refuse a plain checkpoint: packages are not made while they are loaded."""
        if not self.pre_quantized:
            raise UsageError(
                "A plain checkpoint cannot be consolidated while it is loaded.",
                "consolidating needs calibration",
                "Make a package first: conmoe-edge fit MODEL --out DIR",
            )

    def update_device_map(self, device_map: Any) -> dict[str, Any] | None:
        """One device, because prototypes are where the router is."""
        from conmoe_edge.integrations.load_options import one_device, own_code

        with own_code():
            return one_device(device_map)

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        from conmoe_edge.integrations.attach import begin_loading
        from conmoe_edge.integrations.load_options import own_code

        with own_code():
            self._loading = begin_loading(
                model, kwargs.get("checkpoint_files") or (), kwargs.get("device_map")
            )

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        from conmoe_edge.integrations.attach import finish_loading
        from conmoe_edge.integrations.load_options import own_code

        loading, self._loading = self._loading, None
        with own_code():
            finish_loading(model, loading)

    def is_serializable(self) -> bool:
        """False: a package is a folder that is copied, not a state dict."""
        _LOG.warning(
            "A consolidated model is not saved by save_pretrained: its prototypes live in the "
            "package. Copy the package's folder, or make another one with `conmoe-edge fit`."
        )
        return False

    @property
    def is_trainable(self) -> bool:
        """False: prototypes are read-only bytes."""
        return False

    def _dequantize(
        self, model: PreTrainedModel, dtype: torch.dtype | None = None
    ) -> PreTrainedModel:
        raise UsageError(
            "A consolidated model cannot be turned back.",
            "the experts that were removed are gone",
            "Load the original checkpoint instead.",
        )
