"""A folder that takes long to write: it survives being killed, and the same request goes on in it.

The folder ``.NAME.quantizing`` beside the target holds the files under their final names, and three of its own: the request
that they answer, a journal with the checksums of every finished part, and a lock. It becomes the target when all is done.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from filelock import FileLock, Timeout

from .checkpoint import check_replaceable, publish
from .errors import ConfigError, TurboQuantError

_REQUEST, _JOURNAL, _LOCK = ".request.json", ".journal.jsonl", ".lock"
logger = logging.getLogger(__name__)


class PartialFolder:
    """Use as a context: an interruption or a full disk leaves the folder for the next call, an error of this package deletes
    it (its cure changes the request), and so does :meth:`publish`, by turning it into the target.

    Args:
        target: The folder to create. overwrite: as in ``atomic_folder``.
        request: JSON-able; everything that decides the bytes. Parts of another request are deleted.

    Raises:
        FileExistsError: ``target`` exists and must not be replaced. ConfigError: another process is writing it.
    """

    def __init__(self, target: str | os.PathLike[str], request: Mapping[str, Any], overwrite: bool) -> None:
        self.target = Path(os.path.realpath(target))
        self.path = self.target.parent / f".{self.target.name}.quantizing"
        self.overwrite = overwrite
        self._request = json.loads(json.dumps(request))
        # What the journal of an earlier call says of each finished part. Whether the files agree is for the caller to see.
        self.finished: dict[str, Any] = {}

    def __enter__(self) -> PartialFolder:
        check_replaceable(self.target, self.overwrite)
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(self.path / _LOCK)
        try:
            self._lock.acquire(blocking=False)
        except Timeout:
            raise ConfigError(f"another process is writing {self.target}: wait for it, or choose another folder") from None
        if (self.path / _REQUEST).exists() and self._read(_REQUEST) != [self._request]:
            logger.warning(f"{self.path} holds parts made with other settings, versions or input files: starting anew")
            self._clear()
        if not (self.path / _REQUEST).exists():
            (self.path / _JOURNAL).unlink(missing_ok=True)
            _write_synced(self.path / _REQUEST, json.dumps(self._request) + "\n", "w")
        entries = self._read(_JOURNAL)
        for entry in entries:
            self.finished[entry["part"]] = entry["record"]
        if entries:  # without a last line that was cut off, which the next one would be appended to
            whole = self.path / f"{_JOURNAL}.writing"
            _write_synced(whole, "".join(json.dumps(entry) + "\n" for entry in entries), "w")
            whole.replace(self.path / _JOURNAL)
        if self.finished:
            logger.warning(f"going on in {self.path}, which has {len(self.finished)} finished parts")
        return self

    def record(self, part: str, record: Any) -> None:
        """Notes that ``part`` is on disk. ``record``: JSON-able, what the next call needs to believe it."""
        _write_synced(self.path / _JOURNAL, json.dumps({"part": part, "record": record}) + "\n", "a")

    def publish(self) -> None:
        """Turns the folder into the target. Nothing may be written to it afterwards."""
        publish(self.path, self.target, self.overwrite)
        for name in (_REQUEST, _JOURNAL, _LOCK):
            (self.target / name).unlink(missing_ok=True)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is not None and (issubclass(kind, TurboQuantError) or not self._read(_JOURNAL)):
            shutil.rmtree(self.path, ignore_errors=True)  # before another process may lock it
        elif kind is not None:
            logger.warning(f"interrupted: the same call goes on where it was; or delete {self.path}")
        self._lock.release()

    def _read(self, name: str) -> list[Any]:
        """The JSON values of a file, one a line; a last line that was cut off does not count."""
        path = self.path / name
        values = []
        for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
            try:
                values.append(json.loads(line))
            except ValueError:
                break
        return values

    def _clear(self) -> None:
        for path in self.path.iterdir():
            if path.name != _LOCK:
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def _write_synced(path: Path, text: str, mode: str) -> None:
    with path.open(mode, encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
