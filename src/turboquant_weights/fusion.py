"""One matmul for the projections of a decoder block that share an input: q/k/v, gate/up.

The model's own code stays as it is: it calls ``q_proj(x)``, ``k_proj(x)``, ``v_proj(x)``. After :func:`fuse_projections` the
first of them to see ``x`` computes all three in one layer of concatenated rows, keeps the others' parts, and they hand
them out when they are called with the same tensor. Rows of a quantized matrix are independent, so the concatenation
is exact, costs no memory (planes and biases of the members become views of the merged ones), and the rotation of ``x``
is done once.

On a CPU the engine still takes the layers one by one where nothing keeps it from being called directly.

The results are those of the separate layers up to the order in which a GPU adds float32 products.
"""

from __future__ import annotations

import copy
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import ops
from .linear import TurboQuantLinear
from .planes import PLANES
from .reference import PackedWeight
from .rotation import is_autocast_enabled

# Names of sibling modules that take the same input in the usual decoder blocks.
PROJECTIONS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("query", "key", "value"), ("w1", "w3"))

_SHARED = (*PLANES, "bias")  # of the members: views of what is merged


def fuse_projections(model: nn.Module, projections: Sequence[Sequence[str]] = PROJECTIONS) -> list[tuple[str, ...]]:
    """Fuses every set of quantized sibling layers named in ``projections``, in place; returns their full names.

    Layers of one set must agree in input size, settings and device and have no hooks (a hook would run at the wrong
    time); sets that do not are left alone. State dicts, saving, ``.to`` and training of biases or adapters go on
    working. Undo with :func:`unfuse_projections`.
    """
    fused = []
    for prefix, parent in model.named_modules():
        for names in projections:
            members = [getattr(parent, name, None) for name in names]
            if _agree(members):
                _Group(members)  # type: ignore[arg-type]
                fused.append(tuple(f"{prefix}.{name}" if prefix else name for name in names))
    return fused


def unfuse_projections(model: nn.Module) -> int:
    """Makes fused layers separate again, each with memory of its own; returns how many there were."""
    members = [module for module in model.modules() if isinstance(module, _Member)]
    for member in members:
        member.leave()
    return len(members)


def _agree(members: Sequence[object]) -> bool:
    layers = [member for member in members if type(member) is TurboQuantLinear]
    if len(layers) < len(members) or len(layers) < 2:
        return False
    kinds = {(layer.in_features, *layer.settings.values(), layer.codes.device, layer.residual is None) for layer in layers}
    hooked = any(layer._forward_hooks or layer._forward_pre_hooks for layer in layers)
    return len(kinds) == 1 and not layers[0].codes.is_meta and not hooked


def _version(tensor: Tensor) -> int:
    """Goes up with every change in place; tensors of inference mode do not count them, and nobody can tell."""
    return 0 if tensor.is_inference() else tensor._version


def _addresses(parameters: Sequence[Tensor | None]) -> list[int]:
    return [0 if parameter is None else parameter.data_ptr() for parameter in parameters]


def _concatenate(parts: list[Tensor]) -> Tensor:
    """An ordinary tensor: no gradient could go through what inference mode makes, nor an optimizer change it."""
    if torch.compiler.is_compiling() or not torch.is_inference_mode_enabled():
        return torch.cat(parts)
    with torch.inference_mode(False), torch.no_grad():
        return torch.cat(parts)


class _Merged(NamedTuple):
    """Planes of all members in one weight, and what was merged: parameters, and the addresses they have since."""

    planes: PackedWeight
    parameters: Sequence[Tensor | None]
    addresses: list[int]


class _SharedBias(NamedTuple):
    """Biases of the members in one tensor, of which they are views."""

    whole: Tensor
    biases: list[Tensor | None]
    addresses: list[int | None]

    def holds(self, biases: Sequence[Tensor | None]) -> bool:
        """Whether the members' biases are still these. Compiled code asks for the tensors only: it cannot see addresses, so
        an eager call must see first that the memory of a bias was replaced (``bias.data = ...``)."""
        if torch.compiler.is_compiling():
            return all(now is then for now, then in zip(biases, self.biases, strict=True))
        return [None if bias is None else bias.data_ptr() for bias in biases] == self.addresses and all(
            bias is None or bias.dtype == self.whole.dtype for bias in biases
        )


class _Parts:
    """Parts of the last result that are still to be handed out, and whose they are."""

    def __init__(self) -> None:
        self.input: Any = None  # a tensor, or a weak reference: a sibling that is not called keeps nothing alive
        self.key: tuple[Any, ...] = ()  # what else must be alike: the input's version, and whether gradients are wanted
        self.parts: dict[int, Tensor] = {}

    def of(self, x: Tensor, key: tuple[Any, ...], index: int) -> Tensor | None:
        known = self.input() if isinstance(self.input, weakref.ref) else self.input
        if known is not x or self.key != key or index not in self.parts:
            return None
        part = self.parts.pop(index)
        if not self.parts:  # as before the first call: compiled code looks at it
            self.input, self.key = None, ()
        return part

    def keep(self, x: Tensor, key: tuple[Any, ...], parts: dict[int, Tensor]) -> None:
        self.key, self.parts = key, parts
        self.input = x if torch.compiler.is_compiling() else weakref.ref(x, lambda _: parts.clear())


class _PartsOfThread(threading.local, _Parts):
    """Each thread has its own."""


class _Group:
    """Merged planes and biases, and the parts of the last result that are still to be handed out."""

    def __init__(self, members: list[TurboQuantLinear]) -> None:
        self.members = members
        self.merged: _Merged | None = None
        self.bias: _SharedBias | None = None
        self.lock = threading.RLock()  # of the two above: other threads see them when they are complete
        self.parts: _Parts = _PartsOfThread()
        self.traced = _Parts()  # of `torch.compile`, which knows no threads
        for index, member in enumerate(members):
            member.__class__ = _Member
            member.group, member.index = self, index  # type: ignore[assignment]

    def __deepcopy__(self, memo: dict[int, Any]) -> _Group:
        twin = object.__new__(_Group)
        memo[id(self)] = twin
        twin.__setstate__(self.__getstate__())
        twin.members = copy.deepcopy(self.members, memo)
        return twin

    def __getstate__(self) -> dict[str, Any]:
        """Without what is merged: copies of the members would not be views of it."""
        state = dict(self.__dict__, merged=None, bias=None)
        del state["lock"], state["parts"], state["traced"]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, lock=threading.RLock(), parts=_PartsOfThread(), traced=_Parts())

    def invalidate(self) -> None:
        """The members' planes have moved: they are merged again when they are needed."""
        self.merged = self.bias = None
        self.parts, self.traced = _PartsOfThread(), _Parts()

    def holds(self) -> bool:
        """Whether what is merged, if anything, is what the members have: not where their parameters were exchanged for a
        call, as ``torch.func`` does. Where only their memory was (``codes.data = ...``), it is merged again."""
        merged = self.merged
        if merged is None:
            return True
        now = [member._parameters.get(plane) for member in self.members for plane in PLANES]
        if not all(a is b for a, b in zip(now, merged.parameters, strict=True)):
            return False
        if not torch.compiler.is_compiling() and merged.addresses != _addresses(now):
            with self.lock:
                if self.merged is merged:  # else another thread did it, and members may be views of what it merged
                    self.invalidate()
        return True

    def planes(self) -> PackedWeight:
        merged = self.merged
        if merged is None:
            if torch.compiler.is_compiling():
                return self._merge().planes
            with self.lock:
                merged = self.merged or self._merge()
        return merged.planes

    def _merge(self) -> _Merged:
        columns: list[Tensor | None] = []
        for plane in PLANES:
            parts = [getattr(member, plane) for member in self.members]
            columns.append(None if parts[0] is None else _concatenate([part.detach() for part in parts]))
        planes = PackedWeight(*columns)  # type: ignore[arg-type]
        for plane, whole in planes._asdict().items():
            if whole is not None:
                for member, rows in zip(self.members, whole.split(self._sizes()), strict=True):
                    getattr(member, plane).data = rows
        parameters = [member._parameters.get(plane) for member in self.members for plane in PLANES]
        addresses: list[int] = []
        if not torch.compiler.is_compiling():
            addresses = _addresses(parameters)
            self._share_bias()
        self.merged = _Merged(planes, parameters, addresses)
        return self.merged

    def _sizes(self) -> list[int]:
        return [member.out_features for member in self.members]

    def _biases(self) -> list[Any]:
        # Not the attribute where it is an ordinary parameter: nn.Module needs a microsecond to find one.
        return [m._parameters["bias"] if "bias" in m._parameters else m.bias for m in self.members]  # noqa: SIM401

    def _share_bias(self) -> None:
        """Makes the members' biases views of one tensor, which a compiled model would else put together in every step. Not
        those of different types, nor what is not a parameter."""
        biases = self._biases()
        present = [bias for bias in biases if bias is not None]
        self.bias = None
        if not all(type(bias) is nn.Parameter and bias.dtype == present[0].dtype for bias in present) or not present:
            return
        with torch.no_grad():
            whole = self._join(biases)
        for bias, rows in zip(biases, whole.split(self._sizes()), strict=True):
            if bias is not None:
                bias.data = rows
        self.bias = _SharedBias(whole, biases, [None if bias is None else bias.data_ptr() for bias in biases])

    def merged_bias(self) -> Tensor | None:
        biases = self._biases()
        present = [bias for bias in biases if bias is not None]
        if not present:
            return None
        if torch.is_grad_enabled() and any(bias.requires_grad for bias in present):
            return self._join(biases)
        shared = self.bias
        if (shared is None or not shared.holds(biases)) and not torch.compiler.is_compiling():
            with self.lock:
                if self.bias is shared:  # else another thread did it
                    self._share_bias()
                shared = self.bias
        if shared is None or not shared.holds(biases):
            return self._join(biases)
        return shared.whole

    def _join(self, biases: list[Any]) -> Tensor:
        like = next(bias for bias in biases if bias is not None)
        return _concatenate(
            [like.new_zeros(m.out_features) if b is None else b for m, b in zip(self.members, biases, strict=True)]
        )

    def take(self, index: int, x: Tensor) -> Tensor:
        """The result of member ``index`` for ``x``."""
        compiling = torch.compiler.is_compiling()
        kept = self.traced if compiling else self.parts
        key: tuple[Any, ...] = (torch.is_grad_enabled(),)
        if not compiling:
            key = _version(x), torch.is_inference_mode_enabled(), *key
        part = kept.of(x, key, index)
        if part is None:
            first = self.members[0]
            layout = first.in_features, first.bits, first.residual_bits, first.group_size, first.seed
            out = ops.linear(x, *self.planes(), self.merged_bias(), *layout)
            parts = dict(enumerate(out.split(self._sizes(), -1)))
            part = parts.pop(index)
            kept.keep(x, key, parts)
        return part


class _Member(TurboQuantLinear):
    """A fused layer: the same parameters and state dict as before."""

    group: _Group
    index: int

    def forward(self, input: Tensor) -> Tensor:
        if self.group.merged is None and not torch.compiler.is_compiling():
            self.group.planes()  # also where they are read one by one: compiled code would merge them in every step
        # The CPU engine starts faster than parts are kept and handed out.
        out = self._on_cpu(input)
        if out is not None:
            return out
        self.check_input(input)
        if (is_autocast_enabled(input) and input.dtype != torch.float64) or not self.group.holds():
            return super().forward(input)  # the cast makes a new tensor each time: nothing to share
        return self.group.take(self.index, input)

    def leave(self) -> None:
        for name in _SHARED:
            parameter = self._parameters.get(name)
            if parameter is not None:
                parameter.data = parameter.data.clone()
        self.group.invalidate()
        self.__class__ = TurboQuantLinear  # type: ignore[assignment]
        del self.group, self.index

    def base_only_(self) -> _Member:
        """Drops the residual planes of all fused layers: they run together or not at all."""
        for member in self.group.members:
            TurboQuantLinear.base_only_(member)
        self.group.invalidate()
        return self

    def _set_planes(self, packed: PackedWeight) -> None:
        super()._set_planes(packed)
        self.group.invalidate()

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.group.invalidate()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> _Member:
        super()._apply(fn, recurse)
        self.group.invalidate()
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """Copies of what is merged: files cannot hold tensors that share memory."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in _SHARED:
            if not keep_vars and destination.get(prefix + name) is not None:
                destination[prefix + name] = destination[prefix + name].clone()
