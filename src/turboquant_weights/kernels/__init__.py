"""Triton kernels. The only place that imports triton; ``ops.py`` imports it inside its CUDA dispatch.

Canonical planes are read as they lie in the checkpoint: nothing is repacked, on any GPU. A tensor-core fragment fixes which
column of a dot product each register holds, but a sum does not care about the order of its terms, so instead of permuting
the weights the rotation kernel writes the activation in the order in which the decoder emits the columns (``decode.py``).

For one token a layer is one launch (``rotating.py``). For more it is two: ``rotate.py`` (signs, Hadamard, a power of two per
token, half precision), then ``slices.py`` or ``splitk.py`` (decode in registers, tensor cores, split-K with a deterministic
reduction, exponents and bias), or, for more tokens and large layers on sm_90, ``streamk.py`` (the same with roles for warps,
the copy engine and stream-K). Above a crossover (``schedule.py``) the layer is dequantized into scratch memory
(``dequantize.py``) for cuBLAS.
"""
