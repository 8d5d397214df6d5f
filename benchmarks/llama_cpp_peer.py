"""llama.cpp's own quantizer as a peer, through its Python package (llama-cpp-python) and the ``gguf`` package.

The reference GGUF is expanded to float32, quantized by llama.cpp's own code, read back through Transformers, and measured
like everything else. Its K-quants need 256 to divide the columns; where it does not, llama.cpp takes blocks of 32 instead
(Q4_K becomes Q5_0, Q5_K Q5_1, Q6_K Q8_0) and the file is larger than its name says: ``note`` lists the types really used.
A reference whose weights came from blocks of 32 (as those of both test models do) favours blocks of 32.

The importance matrix ("imatrix") is the mean square of each input column over the calibration text, which is what
llama.cpp's own tool collects.
"""

from __future__ import annotations

import collections
import contextlib
import ctypes
import os
import pathlib
import tempfile
from collections.abc import Callable

import gguf
import numpy as np
import torch
from peers import Peer
from torch import Tensor, nn

from turboquant_weights.integrations.transformers import load_dense
from turboquant_weights.model import plan_layers

# File type and whether with the importance matrix: the rows worth showing (Q8_0 does not use one).
_FILES = (
    ("IQ4_XS", True),
    ("Q4_K_M", False),
    ("Q4_K_M", True),
    ("Q5_K_M", False),
    ("Q5_K_M", True),
    ("Q6_K", False),
    ("Q8_0", False),
)


def llama_cpp_rows(source: str) -> dict[str, Callable[[nn.Module, Tensor], Peer]]:
    """Row name -> peer; ``source`` is the reference's GGUF file."""
    importance: dict[str, Tensor] = {}  # collected once, by the first row that wants it

    def peer(ftype: str, with_importance: bool) -> Callable[[nn.Module, Tensor], Peer]:
        def build(reference: nn.Module, calibration: Tensor) -> Peer:
            if with_importance and not importance:
                importance.update(_importance(reference, calibration, source))
            return _quantized(reference, source, ftype, importance if with_importance else {})

        return build

    return {f"llama.cpp {ftype}" + (", imatrix" if with_it else ""): peer(ftype, with_it) for ftype, with_it in _FILES}


def _quantized(reference: nn.Module, source: str, ftype: str, importance: dict[str, Tensor]) -> Peer:
    weight = next(reference.parameters())
    with tempfile.TemporaryDirectory() as folder:
        full, quantized = pathlib.Path(folder, "full.gguf"), pathlib.Path(folder, "quantized.gguf")
        expand(source, full)
        quantize(full, quantized, ftype, importance)
        full.unlink()
        tensors = gguf.GGUFReader(quantized).tensors
        model, _ = load_dense(quantized, dtype=weight.dtype)
    matrices = [tensor for tensor in tensors if len(tensor.shape) > 1]
    types: collections.Counter[str] = collections.Counter()
    for tensor in matrices:
        types[tensor.tensor_type.name] += int(tensor.n_elements)
    return Peer(
        model.eval().to(weight.device),
        weights=types.total(),
        stored=sum(int(tensor.n_bytes) for tensor in matrices),
        total=sum(int(tensor.n_bytes) for tensor in tensors),
        note=", ".join(f"{name} {count / types.total():.0%}" for name, count in types.most_common()),
    )


def expand(source: str | os.PathLike[str], target: pathlib.Path) -> None:
    """Writes the GGUF ``source`` again with all tensors in float32."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, reader.fields["general.architecture"].contents())
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name in ("general.architecture", "general.file_type"):
            continue
        sub_type = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(name, field.contents(), field.types[0], sub_type=sub_type)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    for tensor in reader.tensors:
        data = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False)
        writer.add_tensor(tensor.name, data.reshape([int(n) for n in reversed(tensor.shape)]))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def quantize(source: pathlib.Path, target: pathlib.Path, ftype: str, importance: dict[str, Tensor]) -> None:
    try:
        import llama_cpp
    except ImportError as error:
        raise SystemExit(
            f"llama.cpp's rows need its package ({error}): pip install llama-cpp-python, or leave out --rows 'llama.cpp*'"
        ) from None
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{ftype}")
    params.nthread = torch.get_num_threads()
    columns = {name: np.ascontiguousarray(values, dtype=np.float32) for name, values in importance.items()}
    # The list ends with an entry without a name.
    entries = (llama_cpp.llama_model_imatrix_data * (len(columns) + 1))()
    for entry, (name, values) in zip(entries, columns.items(), strict=False):
        entry.name, entry.size = name.encode(), values.size
        entry.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    if columns:
        params.imatrix = entries
    with _quiet():
        code = llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), params)
    if code != 0:
        raise RuntimeError(f"llama.cpp could not quantize {source} to {ftype}: code {code}")


@torch.no_grad()
def _importance(reference: nn.Module, calibration: Tensor, source: str) -> dict[str, Tensor]:
    """GGUF tensor name -> mean square of each input column [k] of the layers in the decoder's blocks."""
    architecture = gguf.GGUFReader(source).fields["general.architecture"].contents()
    arch = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(arch, reference.config.num_hidden_layers)
    sums: dict[str, Tensor] = {}

    def add(name: str, x: Tensor) -> None:
        sums[name] = sums.get(name, 0) + x.flatten(0, -2).double().square().sum(0)

    with contextlib.ExitStack() as stack:
        for layer in plan_layers(reference)[0]:
            name = names.get_name(layer, try_suffixes=(".weight",))
            if name is None:
                raise RuntimeError(f"{layer} has no name in GGUF files of the architecture {architecture}")
            hook = reference.get_submodule(layer).register_forward_pre_hook(
                lambda _, args, name=name: add(f"{name}.weight", args[0])
            )
            stack.callback(hook.remove)
        for window in calibration:
            reference(input_ids=window[None].to(next(reference.parameters()).device), use_cache=False, logits_to_keep=1)
    return {name: (total / calibration.numel()).float().cpu() for name, total in sums.items()}


@contextlib.contextmanager
def _quiet():  # llama.cpp writes a line per tensor to stderr
    stderr = os.dup(2)
    with open(os.devnull, "w") as null:
        os.dup2(null.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
