"""Compiles the CPU engine and, where Python's headers are, the module that calls it without the interpreter in between.

The build of the package does; so does ``python -m turboquant_weights.cpu``, afterwards.

Imports nothing but the standard library: the build hook loads this file by its path.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path

SOURCES = ("engine.c", "portable.c", "avx2.c", "avx512.c", "avx512_bf16.c", "avx512_vnni.c", "neon.c")
FLAGS = ("-std=gnu11", "-O3", "-fno-math-errno", "-fno-trapping-math", "-fPIC", "-shared", "-fvisibility=hidden", "-pthread")
WARNINGS = ("-Wall", "-Wextra", "-Werror")  # for tests; a user's compiler may know new ones
LIBRARY = "_engine.dylib" if sys.platform == "darwin" else "_engine.so"
CALLS_SOURCE, CALLS = "call.c", "_call.abi3.so"  # for every Python from 3.10 on, but for those without the stable ABI
FOLDER = Path(__file__).parent


class CompilerError(Exception):
    """There is no C compiler, something it needs is missing, or it failed; the message says which."""


def compiler() -> list[str]:
    """The command of the C compiler: ``CC``, or the first of cc, gcc and clang that exists."""
    if "CC" in os.environ:
        return shlex.split(os.environ["CC"])
    for name in ("cc", "gcc", "clang"):
        if shutil.which(name):
            return [name]
    raise CompilerError("no C compiler found (cc, gcc or clang; the variable CC names another)")


def build(target: Path, flags: Sequence[str] = ()) -> None:
    """Compiles the engine into the file ``target``, which changes only if the compiler succeeds."""
    if os.name == "nt":
        raise CompilerError("the CPU engine is not built on Windows")
    _compile(target, SOURCES, (*flags, "-lm"))


def build_calls(target: Path, flags: Sequence[str] = ()) -> None:
    """The same for the module of calls. What is missing without it is some 20 microseconds per call."""
    headers = Path(sysconfig.get_path("include"))
    if not (headers / "Python.h").exists():
        raise CompilerError(f"Python's headers are not installed ({headers / 'Python.h'})")
    undefined = ("-undefined", "dynamic_lookup") if sys.platform == "darwin" else ()  # Python has the symbols
    _compile(target, (CALLS_SOURCE,), (*flags, f"-I{headers}", *undefined))


def _compile(target: Path, sources: Sequence[str], flags: Sequence[str]) -> None:
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    command = [*compiler(), *FLAGS, "-o", str(temporary), *(str(FOLDER / source) for source in sources), *flags]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise CompilerError(f"{command[0]} cannot be run: {error}") from error
    if done.returncode:
        temporary.unlink(missing_ok=True)
        raise CompilerError(f"{shlex.join(command)} failed:\n{done.stderr}")
    temporary.replace(target)
