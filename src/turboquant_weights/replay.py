"""Passes over a block on a CPU, of which each goes on where the one before it ended.

Calibration runs a block up to some layers, rounds them, and runs it again from the start up to the next ones. Where passes
cost more than memory, results that no layer still to be rounded has a part in are kept from one pass to the next.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

# A call: the calls around it, the module, and how many times those have called it.
_Place = tuple[int, ...]
_ATTENTION = 0  # in the place of a module; no id is zero
_Result = TypeVar("_Result")


class Replay:
    """Results of the modules with weights inside ``block``, and of attention, by batch, as long as none of ``layers`` was
    called that is not :meth:`final`. Attention is ``torch.nn.functional.scaled_dot_product_attention``.

    Modules are told apart by their place among the calls, which is the same in every pass, since what comes before is. A
    result that was changed in place since is computed again.

    Args:
        room: Bytes that may be kept.
    """

    def __init__(self, block: nn.Module, layers: Iterable[nn.Module], room: int) -> None:
        self._pending = {id(layer) for layer in layers}
        self._modules = [m for m in block.modules() if m is not block and any(True for _ in m.parameters())]
        self._room = room
        self._known: dict[int, dict[_Place, tuple[Any, list[int]]]] = {}

    def final(self, layers: Iterable[nn.Module]) -> None:
        """The weights of ``layers`` stay as they are from now on."""
        self._pending -= {id(layer) for layer in layers}

    def forget(self, batch: int | None = None) -> None:
        """Drops what is kept of one batch, or of all."""
        for number in [*self._known] if batch is None else [batch]:
            for place in [*self._known.get(number, ())]:
                self._drop(self._known[number], place)

    def run(self, batch: int, function: Callable[[], _Result]) -> _Result:
        """``function()``, which runs the block for the batch with this number."""
        known = self._known.setdefault(batch, {})
        places: list[_Place] = [()]  # of the calls at hand, from the outermost
        calls: Counter[_Place] = Counter()
        final = True  # no layer that is still to be rounded was called

        def call(key: int, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            nonlocal final
            place = (*places[-1], key)
            calls[place] += 1
            place = (*place, calls[place])
            if place in known:
                output, versions = known[place]
                if [tensor._version for tensor in _tensors(output)] == versions:
                    return output
                self._drop(known, place)
            final = final and key not in self._pending
            places.append(place)
            try:
                output = forward(*args, **kwargs)
            finally:
                places.pop()
            if final:
                self._keep(known, place, output)
            return output

        own = [module.__dict__.get("forward") for module in self._modules]
        for module in self._modules:
            module.forward = lambda *a, m=module, f=module.forward, **k: call(id(m), f, *a, **k)
        try:
            with _Attention(functools.partial(call, _ATTENTION)):
                return function()
        finally:
            for module, forward in zip(self._modules, own, strict=True):
                if forward is None:
                    del module.forward
                else:
                    module.forward = forward

    def _keep(self, known: dict[_Place, tuple[Any, list[int]]], place: _Place, output: Any) -> None:
        for inner in [inner for inner in known if inner[: len(place)] == place]:
            self._drop(known, inner)
        tensors = _tensors(output)
        size = sum(tensor.nbytes for tensor in tensors)
        if tensors and size <= self._room and not any(tensor.is_inference() for tensor in tensors):
            self._room -= size
            known[place] = output, [tensor._version for tensor in tensors]

    def _drop(self, known: dict[_Place, tuple[Any, list[int]]], place: _Place) -> None:
        output, _ = known.pop(place)
        self._room += sum(tensor.nbytes for tensor in _tensors(output))


class _Attention(TorchFunctionMode):
    """Calls ``instead(function, *args, **kwargs)`` where ``scaled_dot_product_attention`` is called."""

    def __init__(self, instead: Callable[..., Any]) -> None:
        super().__init__()
        self._instead = instead

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is nn.functional.scaled_dot_product_attention:
            return self._instead(func, *args, **kwargs)
        return func(*args, **kwargs)


def _tensors(output: Any) -> list[Tensor]:
    """The tensors of a result; none if it is of a kind that is not kept."""
    items = output if isinstance(output, tuple) else (output,)
    tensors = [item for item in items if isinstance(item, Tensor)]
    return tensors if all(item is None or isinstance(item, Tensor) for item in items) else []
