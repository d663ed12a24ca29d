"""The quantizer ``conmoe``: how ``from_pretrained`` opens a package.

``package_door.py`` checks the package, and ``attach.py`` does the work, before and after transformers loads the dense
weights. transformers imports this file while
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

    from conmoe_edge.checkpoint.package.opened_package import OpenedPackage

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
        self._package: OpenedPackage | None = None

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Refuse a plain checkpoint, as packages are not made while they are loaded, and leave to unpickle."""
        if kwargs.get("weights_only") is False:
            raise UsageError(
                "Weights that can run a program are not loaded.",
                "weights_only=False allows pickles to, and no package has one",
                "from_pretrained without weights_only",
            )
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

    def update_attn_implementation(self, config: Any) -> Any:
        """Check the package. transformers calls this when the config is read and nothing else is, which is why it is
        done here; attention stays as it is.
        """
        from conmoe_edge.integrations.load_options import current_options, own_code
        from conmoe_edge.integrations.package_door import name_dtype, package_named
        from conmoe_edge.integrations.small_files import check_foreign_config

        with own_code():
            self._package = package_named(config)
            if current_options().package is None:
                check_foreign_config(config, self._package)
            name_dtype(config, self._package)
        return super().update_attn_implementation(config)

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """As it is, where there is one."""
        from conmoe_edge.integrations.package_door import check_dtype

        check_dtype(dtype)
        return super().update_dtype(dtype)

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        from conmoe_edge.integrations.attach import begin_loading
        from conmoe_edge.integrations.load_options import own_code
        from conmoe_edge.integrations.package_door import package_loaded

        with own_code():
            name = str(model.config.name_or_path)
            package = package_loaded(name, kwargs.get("checkpoint_files") or (), self._package)
            self._loading = begin_loading(model, package, kwargs.get("device_map"))

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
