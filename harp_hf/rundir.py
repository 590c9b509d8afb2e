"""The run directory: every file appears whole or not at all, and a run continues only where it would repeat itself.

Files can be damaged all the same, by a disk or by a hand. An npz or JSON file holds a checksum, `sha256`; beside an
npy file, which is mapped rather than read, lies one, as `sha256sum -c` takes it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any
from uuid import uuid4

import numpy as np
import yaml
from filelock import FileLock, Timeout

from . import events
from .errors import RunDirError, reason

logger = logging.getLogger(__name__)

# What a run computes; a directory without any of it belongs to no run yet.
_COMPUTED = ("features.npy", "hierarchy.npz", "base.npz", "measurements/*.npz")
_ADVICE = "use another `output_dir`, or delete this one to start afresh"
_LOCK, _OWNER = ".lock", ".owner"
# Longer than `is_locked` takes, which must not keep a run out.
_LOCK_SECONDS = 1.0


class RunDir:
    """A folder that holds everything a run has computed, so that a killed run loses nothing.

    Args:
        path: The folder; it is created where it does not exist.

    Raises:
        RunDirError: The folder cannot be created.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunDirError(f"The run directory {self.path} cannot be created: {error.strerror}.") from error
        self._opened = time.monotonic()

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other runs out of this directory, and sweep up what killed ones were writing.

        The lock is the operating system's, so that of a process that was killed is gone with it.

        Raises:
            RunDirError: Another run is in this directory, or it cannot be written.
        """
        lock = FileLock(self.file(_LOCK), timeout=_LOCK_SECONDS)
        try:
            lock.acquire()
        except Timeout as error:
            raise RunDirError(
                f"The run directory {self.path} is in use by {self.owner()}: wait for its end, or use another "
                "`output_dir`."
            ) from error
        except OSError as error:
            raise RunDirError(f"The run directory {self.path} cannot be written.") from error
        try:
            owner = f"process {os.getpid()} on {socket.gethostname()}"
            self.write(_OWNER, lambda handle: handle.write(owner.encode()))
            for half in self.path.rglob(".*.part"):
                half.unlink(missing_ok=True)
            yield
        finally:
            lock.release()

    def is_locked(self) -> bool:
        """Whether a run is in this directory now.

        Raises:
            RunDirError: The lock cannot be looked at, such as that of another user.
        """
        if not self.file(_LOCK).exists():
            return False
        try:
            with FileLock(self.file(_LOCK), timeout=0):
                return False
        except Timeout:
            return True
        except OSError as error:
            raise RunDirError(f"{self.file(_LOCK)} cannot be opened: {error.strerror}.") from error

    def owner(self) -> str:
        """The process that is in this directory, or was last."""
        told = self.file(_OWNER)
        return told.read_text(encoding="utf-8") if told.exists() else "another process"

    def log(self, event: str, **fields: Any) -> None:
        """Append a line to the event log, with the time and the memory used so far.

        Raises:
            RunDirError: It cannot be written.
        """
        elapsed = round(time.monotonic() - self._opened, 3)
        try:
            events.append(self.path, {"event": event, **fields, "elapsed": elapsed, **events.memory()})
        except OSError as error:
            raise RunDirError(f"{self.file(events.FILE)} cannot be written: {error.strerror}.") from error

    def claim(self, manifest: dict[str, Any]) -> bool:
        """Make this the directory of the run that `manifest` describes, or check that it is.

        A run that was refused or killed before it computed anything has no claim.

        Returns:
            `bool`: Whether it was before.

        Raises:
            RunDirError: The directory cannot be written, or belongs to a run with another pool, proxy set, model or
                setting; the message names the first difference.
        """
        manifest = json.loads(json.dumps(manifest))  # what is known was read from JSON, which has no tuples
        if not os.access(self.path, os.W_OK):
            raise RunDirError(f"The run directory {self.path} cannot be written.")
        if not any(any(self.path.glob(name)) for name in _COMPUTED):
            self.write_json("manifest.json", manifest)
            return False
        known = self.read_json("manifest.json")
        if not isinstance(known, dict):
            raise self._damaged("manifest.json")
        for section in ("pool", "proxy", "model", "features"):
            if known.get(section) != manifest[section]:
                raise RunDirError(
                    f"The run directory {self.path} belongs to a run with another {_WORDS[section]}; {_ADVICE}."
                )
        before, now = known.get("settings", {}), manifest["settings"]
        for name in sorted(before.keys() | now.keys()):
            if before.get(name) != now.get(name):
                raise RunDirError(
                    f"The run directory {self.path} was made with {name}={before.get(name)!r}, not "
                    f"{now.get(name)!r}; {_ADVICE}."
                )
        return True

    def file(self, name: str) -> Path:
        """Path of a file of this directory."""
        return self.path / name

    def write(self, name: str, write: Callable[[IO[bytes]], Any]) -> Path:
        """Write a file aside with `write(handle)`, then put it in place in one step.

        Raises:
            RunDirError: The disk is full or the file cannot be written; what was there before is still there.
        """
        path = self.path / name
        aside = None
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            aside = path.parent / f".{uuid4().hex}.part"  # not a temporary file, which only its owner may read
            with aside.open("xb") as handle:
                write(handle)
                handle.flush()
                os.fsync(handle.fileno())
            aside.replace(path)
        except BaseException as error:
            if aside is not None:
                with suppress(OSError):
                    aside.unlink()
            if isinstance(error, OSError):
                raise RunDirError(f"{path} cannot be written: {error.strerror or reason(error)}.") from error
            raise
        return path

    def write_json(self, name: str, value: dict[str, Any]) -> Path:
        """Write `value` as JSON, with its checksum."""
        plain = json.loads(json.dumps(value))
        plain.pop("sha256", None)
        text = _json(plain | {"sha256": _sha256_of(plain)}) + "\n"
        return self.write(name, lambda handle: handle.write(text.encode()))

    def write_yaml(self, name: str, value: Any) -> Path:
        """Write `value` as YAML, keys in their order."""
        text = yaml.safe_dump(value, sort_keys=False, allow_unicode=True)
        return self.write(name, lambda handle: handle.write(text.encode()))

    def write_arrays(self, name: str, **arrays: Any) -> Path:
        """Write arrays as an npz file, with their checksum."""
        plain = {key: np.asarray(array) for key, array in arrays.items()}
        # First, as damage to a zip file can hide those that follow.
        checked: dict[str, Any] = {"sha256": np.array(_sha256_of_arrays(plain)), **plain}
        return self.write(name, lambda handle: np.savez(handle, **checked))

    def write_matrix(self, name: str, write: Callable[[IO[bytes]], Any]) -> Path:
        """Write an npy file with `write(handle)`, and its checksum beside it."""
        path = self.write(name, write)
        self.write(f"{name}.sha256", lambda handle: handle.write(_sha256_line(path).encode()))
        return path

    def holds(self, name: str) -> bool:
        """Whether an npz, npy or JSON file is there and whole; one that is damaged is named in a warning."""
        if not self.file(name).exists():
            return False
        try:
            if name.endswith(".npy"):
                self._check_matrix(name)
            else:
                (self.read_json if name.endswith(".json") else self.read_arrays)(name)
        except RunDirError:
            logger.warning("%s is damaged or half-written, and made again.", self.file(name))
            return False
        return True

    def _check_matrix(self, name: str) -> None:
        """Raise [`RunDirError`] unless an npy file is what its checksum says: 1.5 GB take a second or two."""
        known = self.file(f"{name}.sha256")
        if not known.exists() or known.read_bytes() != _sha256_line(self.file(name)).encode():
            raise self._damaged(name)

    def read_json(self, name: str) -> Any:
        """Read a JSON file; one without a checksum is taken as it is.

        Raises:
            RunDirError: The file is not there or damaged.
        """
        with self._reading(name):
            value = json.loads(self.file(name).read_text(encoding="utf-8"))
        if isinstance(value, dict) and value.pop("sha256", None) not in (None, _sha256_of(value)):
            raise self._damaged(name)
        return value

    def read_yaml(self, name: str) -> dict[str, Any]:
        """Settings of a YAML file; none where it is not there.

        Raises:
            RunDirError: The file is damaged.
        """
        if not self.file(name).exists():
            return {}
        with self._reading(name):
            value = yaml.safe_load(self.file(name).read_text(encoding="utf-8")) or {}
        if not isinstance(value, dict):
            raise self._damaged(name)
        return value

    def read_arrays(self, name: str) -> dict[str, np.ndarray]:
        """Read an npz file; one without a checksum is taken as it is.

        Raises:
            RunDirError: The file is not there or damaged.
        """
        with self._reading(name), np.load(self.file(name), allow_pickle=False) as opened:
            arrays = dict(opened)
        if "sha256" in arrays and str(arrays.pop("sha256")) != _sha256_of_arrays(arrays):
            raise self._damaged(name)
        return arrays

    def read_matrix(self, name: str) -> np.ndarray:
        """Open an npy file, memory-mapped; only [`RunDir.holds`] reads all of it for its checksum.

        Raises:
            RunDirError: The file is not there or damaged.
        """
        with self._reading(name):
            return np.load(self.file(name), mmap_mode="r", allow_pickle=False)

    @contextmanager
    def _reading(self, name: str) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError as error:
            raise RunDirError(f"{self.path} holds no finished run: {name} is not there.") from error
        except PermissionError as error:
            raise RunDirError(f"{self.file(name)} cannot be read: {error.strerror}.") from error
        except Exception as error:  # numpy, zipfile, zlib and json each raise their own
            raise self._damaged(name) from error

    def _damaged(self, name: str) -> RunDirError:
        advice = _ADVICE if name == "manifest.json" else "run the same command again, which makes it anew"
        return RunDirError(f"{self.file(name)} is damaged; {advice}.")


def _json(value: Any) -> str:
    return json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False)


def _sha256_of(value: dict[str, Any]) -> str:
    return hashlib.sha256(_json(value).encode()).hexdigest()


def _sha256_of_arrays(arrays: dict[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for name in sorted(arrays):
        digest.update(f"{name} {arrays[name].dtype.str} {arrays[name].shape} ".encode())
        digest.update(arrays[name].tobytes())
    return digest.hexdigest()


def sha256_of_file(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as handle:
        while block := handle.read(1 << 24):
            digest.update(block)
    return digest.hexdigest()


def digest_of_files(folder: Path, pattern: str) -> str:
    """Digest of names, sizes and samples of the files that match a pattern, but for hidden folders' such as `.git`."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob(pattern)):
        parents = path.relative_to(folder).parent.parts
        if not path.is_file() or any(part.startswith(".") for part in parents):
            continue
        size = path.stat().st_size
        with path.open("rb") as handle:
            digest.update(f"{'/'.join((*parents, path.name))} {size}".encode())
            for start in range(0, size, max(size // 256, 1)):
                handle.seek(start)
                digest.update(handle.read(4096))
    return digest.hexdigest()[:16]


def _sha256_line(path: Path) -> str:
    """What `sha256sum` prints of a file."""
    return f"{sha256_of_file(path)}  {path.name}\n"


_WORDS = {
    "pool": "pool",
    "proxy": "proxy set",
    "model": "model, adapter or tokenizer",
    "features": "choice of features",
}
