"""The CPU engine: C kernels behind a plain C ABI, one for each family of processors, chosen at run time.

``engine.h`` says how the C side works, ``library.py`` loads it, ``linear.py`` checks every argument and launches it,
``build.py`` compiles it (the package's build does; so does ``python -m turboquant_weights.cpu``).
"""
