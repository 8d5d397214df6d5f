"""Checkpoint folders: written whole or not at all, and checked before anything is allocated (FORMAT.md)."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

CONFIG_FILE = "config.json"


@contextlib.contextmanager
def atomic_folder(path: str | os.PathLike[str], overwrite: bool = False) -> Iterator[Path]:
    """Yields a new empty folder beside ``path``; it becomes ``path`` when the block ends, or vanishes if the block raises.

    Any exception counts, Ctrl-C and a full disk included. Until the end nothing at ``path`` changes. A folder that is
    replaced is moved aside first and deleted last, so one complete checkpoint exists at every moment.

    Args:
        path: The folder to create; its parents are created too. An existing empty folder is no obstacle.
        overwrite: Replace an existing model folder (one with a ``config.json``), whatever else is in it.

    Raises:
        FileExistsError: ``path`` exists and ``overwrite`` is false, or it is not a model folder.
        OSError: from the file system, e.g. a full disk.
    """
    target = Path(os.path.realpath(path))  # through a link: replace what it points to, keep the link
    _check_replaceable(target, overwrite)
    target.parent.mkdir(parents=True, exist_ok=True)
    token = secrets.token_hex(4)
    temporary = target.parent / f".{target.name}.writing-{token}"
    replaced = target.parent / f".{target.name}.replaced-{token}"
    temporary.mkdir()  # not tempfile: its folders are readable by their owner only
    try:
        yield temporary
        _flush(temporary)
        _check_replaceable(target, overwrite)  # it may have appeared meanwhile
        if target.exists():
            target.rename(replaced)
        try:
            temporary.rename(target)
        except BaseException:
            if replaced.exists():
                replaced.rename(target)
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    shutil.rmtree(replaced, ignore_errors=True)


def _check_replaceable(target: Path, overwrite: bool) -> None:
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    if not overwrite:
        raise FileExistsError(f"{target} exists: choose another folder, or allow overwriting it")
    if not (target / CONFIG_FILE).is_file():
        raise FileExistsError(
            f"{target} is not a model folder (it has no {CONFIG_FILE}): only those are overwritten. Choose another, or delete it"
        )


def _flush(folder: Path) -> None:
    """Forces the files to disk: after a power cut the renamed folder must not hold empty files."""
    for file in sorted(folder.rglob("*")):
        if file.is_file():
            with file.open("r+b") as stream:
                os.fsync(stream.fileno())
