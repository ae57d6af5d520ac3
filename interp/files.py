"""Atomic files: a reader sees the whole new content or the old one, never half of it."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from interp.errors import UserError

if TYPE_CHECKING:
    import polars as pl


@contextlib.contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Give a temporary path next to ``path`` to write to; on success it becomes ``path``, else it is removed.

    Folders are made where they are missing, and removed again where nothing was written.

    Raises:
        UserError: If the file system refuses (disk full, no permission); ``path`` is then untouched.
    """
    target = Path(path)
    temporary: Path | None = None
    made: list[Path] = []
    try:
        made = [folder for folder in target.parents if not folder.exists()]
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
        os.close(handle)
        temporary = Path(name)
        yield temporary
        _sync(temporary)
        temporary.chmod(0o644)
        temporary.replace(target)
    except OSError as error:
        raise _refused(target, error) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
        # Only those that are empty go: none, unless it failed.
        for folder in made:
            with contextlib.suppress(OSError):
                folder.rmdir()


@contextlib.contextmanager
def atomic_directory(path: str | Path) -> Iterator[Path]:
    """Give an empty temporary directory next to ``path``; on success it becomes ``path``, else it is removed.

    Raises:
        UserError: If ``path`` exists and is not an empty directory, or the file system refuses; it is then untouched.
    """
    target = Path(path).resolve()
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise UserError(f"{path} exists already; give the name of a new folder.")
    temporary: Path | None = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                _sync(file)
                file.chmod(0o644)
        temporary.chmod(0o755)
        temporary.replace(target)
    except OSError as error:
        raise _refused(target, error) from error
    finally:
        if temporary is not None and temporary.exists():
            shutil.rmtree(temporary, ignore_errors=True)


def _sync(path: Path) -> None:
    with path.open("rb+") as written:
        os.fsync(written.fileno())


def _refused(target: Path, error: OSError) -> UserError:
    return UserError(
        f"Could not write {target}: {error.strerror or error}; nothing was left half-written. "
        "Free some space or choose another folder and run again."
    )


def write_text(path: str | Path, text: str) -> None:
    """Write ``text`` as UTF-8, atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | Path, record: Any) -> None:
    """Write ``record`` as indented JSON, atomically. NaN and infinity are refused."""
    write_text(path, json.dumps(record, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: str | Path) -> Any:
    """Read a JSON file.

    Raises:
        UserError: If the file is missing or is not JSON.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UserError(f"Could not read {path}: {error.strerror or error}; check the path.") from error
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error}); write it again or give another file.") from error


def write_parquet(path: str | Path, frame: pl.DataFrame) -> None:
    """Write ``frame`` as Parquet, atomically."""
    # polars has an error of its own for a disk that is full; Python's says what is wrong.
    buffer = io.BytesIO()
    frame.write_parquet(buffer)
    with atomic_path(path) as temporary:
        temporary.write_bytes(buffer.getvalue())


def assets_directory() -> Path:
    """Where the package's data lies: inside an installed wheel, or at the root of a checkout."""
    packaged = Path(__file__).parent / "_assets"
    return packaged if packaged.is_dir() else Path(__file__).parent.parent / "assets"
