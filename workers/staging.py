"""Writing so that nothing torn is ever visible: a private file, flushed to disk, then moved to its place."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from uuid import uuid4

from filelock import FileLock, Timeout

from schemas.errors import BusyStoreError, StoreError, StoreWriteError
from schemas.layout import STAGING

_LOCK: Final = "lock"


@dataclass(frozen=True)
class Staging:
    """A writer's private folder inside the store, on the same file system as everything it will publish."""

    folder: Path

    def publish_file(self, data: bytes, target: Path) -> None:
        """Makes ``target`` hold ``data``: all of it, on disk, or nothing.

        Raises:
            StoreWriteError: the disk refused; no file is left behind.
        """
        private = self.folder / uuid4().hex
        with refusals(target):
            try:
                with private.open("wb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                target.parent.mkdir(parents=True, exist_ok=True)
                private.replace(target)
                _flush_folder(target.parent)
            finally:
                private.unlink(missing_ok=True)

    def publish_folder(self, private: Path, target: Path) -> None:
        """Moves a finished folder of this staging area to ``target``, which must not exist or be of no value.

        Raises:
            StoreWriteError: the disk refused.
        """
        with refusals(target):
            if target.exists():
                shutil.rmtree(target)
            target.parent.mkdir(parents=True, exist_ok=True)
            for file in (entry for entry in private.rglob("*") if entry.is_file()):
                with file.open("rb") as opened:
                    os.fsync(opened.fileno())
            private.replace(target)
            _flush_folder(target.parent)


@contextmanager
def staging(store: Path, purpose: str) -> Iterator[Staging]:
    """The staging area for one purpose (a batch's name), for one process at a time.

    What an earlier process left there is removed: whoever holds the lock knows that nobody else is at work.

    Raises:
        BusyStoreError: another process has it.
        StoreWriteError: the disk refused.
    """
    folder = store / STAGING / purpose
    with refusals(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / _LOCK)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise BusyStoreError(f"another process is writing {purpose!r} to {store}: wait until it ends") from None
    try:
        with refusals(folder):
            for entry in folder.iterdir():
                if entry.name != _LOCK:
                    shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        yield Staging(folder)
    finally:
        lock.release()


@contextmanager
def refusals(target: Path) -> Iterator[None]:
    """Turns what the operating system refuses into one sentence.

    Raises:
        StoreWriteError: an OSError occurred.
    """
    try:
        yield
    except StoreError:
        raise
    except OSError as error:
        reason = error.strerror or str(error)
        raise StoreWriteError(f"cannot write {target}: {reason}; what was recorded so far is safe") from error


def _flush_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
