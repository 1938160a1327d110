"""peft's LoRA adapters around layers whose weights fastops.light has made integers, float8 numbers or sparse."""

from typing import Any

import torch

from fastops import light
from fastops._extras import needs

with needs("fastops.peft", "huggingface"):
    from peft import LoraConfig
    from peft.tuners import lora
    from peft.tuners.tuners_utils import check_adapters_to_merge

__all__ = ["LoraLinear", "lora_config"]


class LoraLinear(lora.Linear):
    """peft's LoRA layer around a linear layer of fastops.light: W x + b + scaling B A x.

    The adapter is float and is trained; the layer below is not. Merging rounds W + scaling B A anew, as `quantize_`
    rounds W, which changes the output by the rounding. Unmerging gives back what was there before, to the bit. An
    adapter is not merged into a sparse weight.

    Args: as peft's. Raises: ValueError: the layer has an activation, which comes before what the adapter adds, or the
    config asks for lora_bias, for a variant such as DoRA, or for an adapter that begins with parts of the weight.
    """

    def __init__(self, base_layer: Any, adapter_name: str, config: LoraConfig, **kwargs: Any) -> None:
        layer = base_layer.get_base_layer() if hasattr(base_layer, "get_base_layer") else base_layer
        if layer.activation is not None:
            raise ValueError(
                f"LoRA: the layer must have no activation, which an adapter is no part of, got {layer.activation!r}"
            )
        super().__init__(base_layer, adapter_name, config, **kwargs)

    @property
    def lora_variants(self) -> dict[tuple[str, ...], Any]:
        return {(): None}  # the others compute with the weight

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: LoraConfig, **kwargs: Any) -> None:
        if config.lora_bias:
            raise ValueError("LoRA: lora_bias must be False for a layer of fastops.light, got True")
        if config.init_lora_weights not in (True, False, "gaussian"):
            raise ValueError(
                "LoRA: init_lora_weights must be True, False or 'gaussian' for a layer of fastops.light, got "
                f"{config.init_lora_weights!r}"
            )
        super().update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config, **kwargs)

    def _get_base_layer_device_and_dtype(self, base_layer: Any) -> tuple[torch.device, torch.dtype | None]:
        """Where an adapter goes: float8 is no dtype for it."""
        stored = next(base_layer.buffers())
        return stored.device, None if base_layer.bias is None else base_layer.bias.dtype

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        base = self.get_base_layer()
        for name in check_adapters_to_merge(self, adapter_names) or ():
            if name not in self.lora_A:
                continue
            if isinstance(base, light.LinearSparse):
                raise ValueError("LoRA: an adapter cannot be merged into a sparse weight: light.densify_ it first")
            weight = base.dequantized() + self.get_delta_weight(name).float()
            if safe_merge and not weight.isfinite().all():
                raise ValueError(f"LoRA: the weight that adapter {name!r} is merged into is not finite")
            if not self.merged_adapters:
                self._before = dict(base._buffers)
            base._set(weight.detach())
            self.merged_adapters.append(name)

    def unmerge(self) -> None:
        if self.merged_adapters:
            self.get_base_layer()._buffers.update(self.__dict__.pop("_before"))
            self.merged_adapters.clear()


def lora_config(config: LoraConfig) -> LoraConfig:
    """Lets a LoraConfig be used with linear layers of fastops.light: `get_peft_model` then makes LoraLinear of them.

    Quantize first: `quantize_` leaves alone what adapters are around. target_modules has to name the layers, as
    peft's "all-linear" knows torch.nn.Linear alone. A saved config does not remember it:
    `PeftModel.from_pretrained(model, path, config=lora_config(LoraConfig.from_pretrained(path)))`.

    Args:
        config: of peft; it is changed.

    Returns:
        config.

    Raises:
        TypeError: config is no LoraConfig.

    >>> import peft
    >>> from fastops import light
    >>> model = nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))
    >>> report = light.quantize_(model, "int4_weight")
    >>> adapted = peft.get_peft_model(model, lora_config(peft.LoraConfig(target_modules=["0"])))
    >>> adapted.get_nb_trainable_parameters()[0]
    4096
    """
    if not isinstance(config, LoraConfig):
        raise TypeError(f"lora_config: config must be a peft.LoraConfig, got {type(config).__name__}")
    layers = light.LinearInt8, light.LinearInt8Static, light.LinearWeightOnly, light.LinearSparse
    config._register_custom_module(dict.fromkeys(layers, LoraLinear))
    return config
