"""A file written through `replaced_file` is whole or not there."""

from pathlib import Path

import pytest

from seqfraud.files import replaced_file


def names(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


def write_half(final: Path) -> None:
    with replaced_file(final) as temporary:
        temporary.write_text("half")
        raise OSError("disk full")


def test_the_file_appears_when_it_is_whole(tmp_path: Path) -> None:
    final = tmp_path / "scores.parquet"
    with replaced_file(final) as temporary:
        assert temporary.parent == tmp_path, "a rename is atomic only within one file system"
        assert temporary.name.startswith("."), "readers of a folder skip it"
        temporary.write_text("new")
        assert not final.exists()
    assert final.read_text() == "new"
    assert names(tmp_path) == ["scores.parquet"]


def test_an_older_file_is_there_until_it_is_replaced(tmp_path: Path) -> None:
    final = tmp_path / "scores.parquet"
    final.write_text("old")
    with replaced_file(final) as temporary:
        temporary.write_text("new")
        assert final.read_text() == "old"
    assert final.read_text() == "new"


def test_an_error_leaves_the_older_file_and_nothing_else(tmp_path: Path) -> None:
    final = tmp_path / "scores.parquet"
    final.write_text("old")
    with pytest.raises(OSError, match="disk full"):
        write_half(final)
    assert final.read_text() == "old"
    assert names(tmp_path) == ["scores.parquet"]


def test_nothing_written_is_an_error(tmp_path: Path) -> None:
    final = tmp_path / "scores.parquet"
    with pytest.raises(FileNotFoundError), replaced_file(final):
        pass
    assert names(tmp_path) == []
