"""What merging adapters into quantized layers cost. The merged weight is rounded to the layer's own bits again, and an
update smaller than a rounding step can be lost in that: the report says how much of it was."""

from __future__ import annotations

import dataclasses

from torch import Tensor, nn

from ..errors import ConfigError
from ..planes import PackedPlanes


@dataclasses.dataclass(frozen=True)
class MergeError:
    """Of one layer, squared norms relative to that of the merged weight before rounding: ``rounding`` of what rounding it
    changed, ``update`` of what the adapters changed."""

    rounding: float
    update: float

    @classmethod
    def between(cls, before: Tensor, merged: Tensor, rounded: Tensor) -> MergeError:
        energy = merged.double().square().sum().item() or 1.0
        return cls(
            rounding=(rounded - merged).double().square().sum().item() / energy,
            update=(merged - before).double().square().sum().item() / energy,
        )

    @property
    def lost(self) -> float:
        """Rounding error over update. From 1 on the update is gone: the weight was rounded to about what it had been."""
        return self.rounding / self.update if self.update else 0.0


@dataclasses.dataclass(frozen=True)
class MergeReport:
    """Result of :func:`merge_report`: the layers that adapters were merged into, by name, with their bits."""

    layers: dict[str, MergeError]
    labels: dict[str, str]

    @property
    def lost(self) -> float:
        """Rounding error over update, of all layers together: their mean squares relative to the weights."""
        update = sum(layer.update for layer in self.layers.values())
        return sum(layer.rounding for layer in self.layers.values()) / update if update else 0.0

    def __str__(self) -> str:
        count = len(self.layers)
        mean = sum(layer.rounding for layer in self.layers.values()) / count
        worst = max(self.layers, key=lambda name: self.layers[name].lost)
        return (
            f"adapters merged into {count} layers and rounded again: relative squared error {mean:.2e}, "
            f"{self.lost:.3f} of the update's square\n"
            f"most in {worst} at {self.labels[worst]} bits: {self.layers[worst].lost:.3f}"
        )


def merge_report(model: nn.Module) -> MergeReport:
    """What rounding cost where adapters were merged into the quantized layers of ``model``.

    Call it after PEFT's ``merge_adapter`` or ``merge_and_unload``, on the PEFT model or on the one inside, whose names it
    uses.

    Raises:
        ConfigError: no adapter was merged into a quantized layer.
    """
    merged = {
        name.removesuffix(".base_layer").removeprefix("base_model.model."): module
        for name, module in model.named_modules()
        if isinstance(module, PackedPlanes) and module.merge_error is not None
    }
    if not merged:
        raise ConfigError(f"no adapter was merged into a quantized layer of this {type(model).__name__}: merge one first")
    errors = {name: module.merge_error for name, module in merged.items()}
    return MergeReport(
        {name: error for name, error in errors.items() if error is not None},
        {name: module.label for name, module in merged.items()},
    )
