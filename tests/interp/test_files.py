import errno
import os
import resource

import numpy as np
import polars as pl
import pytest

from interp.errors import UserError
from interp.files import atomic_directory, read_json, write_json, write_parquet, write_text


def refuse(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    write_text(tmp_path / "file.txt", "old")
    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(UserError, match="No space left on device"):
        write_text(tmp_path / "file.txt", "new")
    assert [path.name for path in tmp_path.iterdir()] == ["file.txt"]
    assert (tmp_path / "file.txt").read_text() == "old"


def test_a_write_that_fails_leaves_no_new_folders(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(UserError, match="No space left on device"):
        write_text(tmp_path / "new" / "folder" / "file.txt", "new")
    assert list(tmp_path.iterdir()) == []


def test_a_byte_order_mark_is_not_part_of_a_record(tmp_path):
    (tmp_path / "record.json").write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert read_json(tmp_path / "record.json") == {"a": 1}


def test_a_directory_appears_whole_or_not_at_all(tmp_path):
    with pytest.raises(RuntimeError), atomic_directory(tmp_path / "folder") as partial:
        (partial / "part").write_text("x")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_a_folder_with_something_in_it_is_never_replaced(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "precious").write_text("x")
    with pytest.raises(UserError, match="exists already"), atomic_directory(tmp_path / "folder"):
        pass
    assert (tmp_path / "folder" / "precious").read_text() == "x"


def test_a_table_that_the_system_cuts_off_is_one_sentence(tmp_path):
    """A real refusal of the operating system in the middle of a write: no file may grow beyond 1,000 bytes."""
    table = pl.DataFrame({"a": np.random.default_rng(0).normal(size=10_000)})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(UserError, match="File too large"):
            write_parquet(tmp_path / "table.parquet", table)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="Could not write"):
        write_text(tmp_path / "file" / "below.txt", "x")


def test_nan_is_refused(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "x.json", {"value": float("nan")})
    assert list(tmp_path.iterdir()) == []
