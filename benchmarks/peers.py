"""Other weight quantizers, one function each: from the reference model to a model with that method's weights.

Every peer returns the weights de-quantized in the reference's own architecture and dtype, so all are measured by the same
forward pass, and counts the bits that its files would store. Calibrated peers get the same calibration windows as ours.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable

import torch
from gptq import integer_grid, quantize_blocks, round_to_grid
from torch import Tensor, nn

from turboquant_weights.model import plan_layers

# Bytes of a parameter that a method leaves alone.
_DENSE_BYTES = 2


@dataclasses.dataclass
class Peer:
    """A quantized model. ``weights`` is the number of weights that the method quantized, ``stored`` the bytes of everything
    that it stores for them, ``total`` the bytes of the whole model."""

    model: nn.Module
    weights: int
    stored: float
    total: float
    note: str = ""


def largest_block(columns: int, limit: int) -> int:
    return min(limit, columns & -columns)


def rtn(weight: Tensor, bits: int, limit: int) -> tuple[Tensor, float]:
    """Asymmetric min-max integers: fp16 scale and ``bits``-bit zero point per block. Returns weight and bits per weight."""
    block = largest_block(weight.shape[1], limit)
    blocks = weight.float().view(-1, block)
    rounded = round_to_grid(blocks, *integer_grid(blocks, bits, search=False), bits)
    return rounded.view(weight.shape), bits + (16 + bits) / block


def nf4(weight: Tensor, limit: int = 64) -> tuple[Tensor, float]:
    """NormalFloat4 (Dettmers et al. 2023) with an fp16 absolute maximum per block."""
    positive = torch.distributions.Normal(0.0, 1.0).icdf(torch.linspace(0.9677083, 0.5, 9)[:-1])
    negative = -torch.distributions.Normal(0.0, 1.0).icdf(torch.linspace(0.9677083, 0.5, 8)[:-1])
    table = torch.cat([negative, torch.zeros(1), positive]).sort().values
    table = (table / table.max()).to(weight.device)
    block = largest_block(weight.shape[1], limit)
    blocks = weight.float().view(-1, block)
    scale = blocks.abs().amax(1, keepdim=True).half().float().clamp(min=1e-8)
    index = torch.bucketize(blocks / scale, (table[1:] + table[:-1]) / 2)
    return (table[index] * scale).view(weight.shape), 4 + 16 / block


def hqq(weight: Tensor, bits: int, group: int) -> tuple[Tensor, float]:
    """HQQ (Badri and Shaji 2023) by its own package, along the rows as its kernels want it: fp16 scale and zero point."""
    try:
        from hqq.core.quantize import Quantizer
    except ImportError as error:
        raise SystemExit(
            f"HQQ needs the package hqq ({error}): pip install hqq==0.2.8.post1, or leave out --rows 'HQQ*'"
        ) from None
    codes, meta = Quantizer.quantize(
        weight.float(), nbits=bits, group_size=group, axis=1, bitpack=False, device=str(weight.device)
    )
    meta["scale"], meta["zero"] = meta["scale"].half().float(), meta["zero"].half().float()
    return Quantizer.dequantize(codes.float(), meta | {"compute_dtype": torch.float32}), bits + 32 / group


def rounded(method: Callable[..., tuple[Tensor, float]], *settings: int) -> Callable[[nn.Module, Tensor], Peer]:
    """A peer that treats each layer by itself, without data."""

    def build(reference: nn.Module, _: Tensor) -> Peer:
        model = copy.deepcopy(reference)
        bits = 0.0
        names = plan_layers(model)[0]
        with torch.no_grad():
            for name in names:
                weight = model.get_submodule(name).weight
                new, per_weight = method(weight, *settings)
                weight.copy_(new)
                bits += per_weight * weight.numel()
        return _linears_only(model, names, bits)

    return build


def gptq(bits: int, group: int, embedding_bits: int | None = None) -> Callable[[nn.Module, Tensor], Peer]:
    """``embedding_bits``: round the embedding, and the head where it is tied to it, to integers in blocks of 64."""

    def build(reference: nn.Module, calibration: Tensor) -> Peer:
        model = copy.deepcopy(reference)
        names = plan_layers(model)[0]
        quantize_blocks(model, names, calibration, bits, group, search=True)
        stored = 0.0
        for name in names:
            weight = model.get_submodule(name).weight
            stored += weight.numel() * (bits + (16 + bits) / largest_block(weight.shape[1], group))
        peer = _linears_only(model, names, stored)
        if embedding_bits is not None:
            with torch.no_grad():
                weight = model.get_input_embeddings().weight
                new, per_weight = rtn(weight, embedding_bits, 64)
                weight.copy_(new)
            size = weight.numel() * per_weight / 8
            peer.weights, peer.stored = peer.weights + weight.numel(), peer.stored + size
            peer.total += size - _DENSE_BYTES * weight.numel()
        return peer

    return build


def _linears_only(model: nn.Module, names: list[str], bits: float) -> Peer:
    weights = sum(model.get_submodule(name).weight.numel() for name in names)
    others = sum(parameter.numel() for parameter in model.parameters()) - weights
    return Peer(model, weights, bits / 8, bits / 8 + _DENSE_BYTES * others)


PEERS: dict[str, Callable[[nn.Module, Tensor], Peer]] = {
    "integer RTN, 128": rounded(rtn, 4, 128),
    "integer RTN, 64": rounded(rtn, 4, 64),
    "NF4, 64": rounded(nf4, 64),
    "HQQ, 128": rounded(hqq, 4, 128),
    "HQQ, 64": rounded(hqq, 4, 64),
    "GPTQ, 128": gptq(4, 128),
    "GPTQ, 64": gptq(4, 64),
    "GPTQ, 128, embedding 8 bits": gptq(4, 128, embedding_bits=8),
    "integer RTN 8 bits, 128": rounded(rtn, 8, 128),
}
