"""What call.c has for linear.py."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

def prepare(
    tensor: type[Tensor],
    parameter: type[Tensor],
    exchange: object,
    empty: Callable[..., Tensor],
    keywords: tuple[dict[str, Any], ...],
    threads: Callable[[], int],
    grad_enabled: Callable[[], bool],
    watchers: tuple[Callable[[], Any], ...],
    forward_ad: dict[str, Any],
    /,
) -> bool: ...
def bind(
    run: int,
    calls: tuple[int, ...],
    tensors: tuple[Tensor | None, ...],
    in_features: int,
    layout: tuple[int, ...],
    rows: int,
    few: int,
    owner: object,
    /,
) -> Callable[[Tensor, Mapping[str, Any]], Tensor | None] | None: ...
def kernel(known: dict[int, Callable[..., Tensor | None]], other: Callable[..., Tensor], /) -> Callable[..., Tensor]: ...
