"""Triton kernels. The only place that imports triton; ``ops.py`` imports it inside its CUDA dispatch.

Canonical planes are read as they lie in the checkpoint: nothing is repacked, on any GPU. A tensor-core fragment fixes which
column of a dot product each register holds, but a sum does not care about the order of its terms, so instead of permuting
the weights the rotation kernel writes the activation in the order in which the decoder emits the columns (``decode.py``).

For one token a layer is one launch (``rotating.py``), unless it is large. Then, and for more tokens, it is two: a rotation
(signs, Hadamard, half precision with a power of two per token, or integers), and a product that decodes in registers, with
split-K by a deterministic reduction, exponents and bias. Base planes of large layers are multiplied on the integer tensor
cores, for one token by ``integer.py``, for two to four by ``few.py``, with codes through ``ring.py``; others in half
precision, up to 8 tokens by ``slices.py``, more by ``splitk.py``, or, in large layers on sm_90, by ``streamk.py`` (roles
for warps, the copy engine and stream-K), which takes large layers with a residual for fewer tokens, too. ``schedule.py``
chooses. Above a crossover the layer is dequantized into scratch memory (``dequantize.py``) for cuBLAS.
"""
