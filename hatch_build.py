"""Build hook: compiles the CPU engine into the wheel, or, for an editable installation, beside its sources.

Without a working C compiler the package is installed all the same, as pure Python; it says so here and once when it runs.
"""

import importlib.util
import shutil
import sysconfig
import tempfile
from pathlib import Path

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

ROOM = Path("src/turboquant_weights/cpu")


def _compiling():
    spec = importlib.util.spec_from_file_location("turboquant_build", Path(__file__).parent / ROOM / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class EngineHook(BuildHookInterface):
    def initialize(self, version, build_data):
        compiling = _compiling()
        self.folder = None if version == "editable" else tempfile.mkdtemp()
        room = Path(self.folder or Path(self.root) / ROOM)
        built = [compiling.LIBRARY]
        try:
            compiling.build(room / compiling.LIBRARY)
        except compiling.CompilerError as error:
            self.app.display_warning(
                f"The CPU engine of turboquant-weights was not built: {error}\n"
                "Quantized layers will compute with the PyTorch reference on CPUs, correct but many times slower. "
                "Install gcc or clang and install again, or run: python -m turboquant_weights.cpu"
            )
            return
        try:
            compiling.build_calls(room / compiling.CALLS)
            built.append(compiling.CALLS)
        except compiling.CompilerError as error:
            self.app.display_warning(f"Calls of turboquant-weights' CPU engine will take some 20 us longer: {error}")
        if self.folder:
            for name in built:
                build_data["force_include"][str(room / name)] = f"turboquant_weights/cpu/{name}"
        platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
        build_data["pure_python"] = False
        # Any Python: the engine has a plain C ABI, and where the module of calls is of no use the package does without.
        build_data["tag"] = f"py3-none-{platform}"

    def finalize(self, version, build_data, artifact_path):
        if self.folder:
            shutil.rmtree(self.folder, ignore_errors=True)
