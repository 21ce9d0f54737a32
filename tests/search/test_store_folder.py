"""The folder of a run's store: whose it is, what a full disk and a kill leave in it."""

import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from onnxcomp.errors import ParameterError
from onnxcomp.search import store as module
from onnxcomp.search.store import MARKER, Store

KEY = ("conv1", 3, 0.5)


@pytest.fixture
def store(tmp_path) -> Store:
    return Store(tmp_path / "state", "run")


def test_a_folder_is_made_marked_and_opened_again(tmp_path):
    folder = tmp_path / "state"
    Store(folder).put("kind", KEY, 1)
    assert "schema 2" in (folder / MARKER).read_text().splitlines()[0]
    assert Store(folder).get("kind", KEY) == 1


def test_an_empty_folder_is_taken(tmp_path):
    Store(tmp_path).put("kind", KEY, 1)
    assert Store(tmp_path).get("kind", KEY) == 1


@pytest.mark.parametrize("marker", [None, "", "Read me first.\n", "onnxcomp resume state\n"])
def test_a_folder_of_something_else_is_refused(marker, tmp_path):
    (tmp_path / "thesis.tex").touch()
    if marker is not None:
        (tmp_path / MARKER).write_text(marker)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(
        ParameterError, match=r"--resume: .*not of a run.*give a new or an empty"
    ):
        Store(tmp_path)
    assert sorted(tmp_path.iterdir()) == before
    assert marker is None or (tmp_path / MARKER).read_text() == marker


def test_another_schema_is_refused(tmp_path):
    Store(tmp_path)
    text = (tmp_path / MARKER).read_text().replace("schema 2", "schema 3")
    (tmp_path / MARKER).write_text(text)
    with pytest.raises(ParameterError, match=r"--resume: .*of schema 3, not 2; give a new"):
        Store(tmp_path)
    assert (tmp_path / MARKER).read_text() == text


@pytest.mark.parametrize("kind", ["file", "in no folder", "in a file", "marker is a link"])
def test_impossible_folders_are_refused(kind, tmp_path):
    folder = tmp_path / "state"
    if kind == "file":
        folder.touch()
    elif kind == "in a file":
        (tmp_path / "file").touch()
        folder = tmp_path / "file" / "state"
    elif kind == "in no folder":
        folder = tmp_path / "absent" / "state"
    else:
        Store(tmp_path / "other")
        folder.mkdir()
        (folder / MARKER).symlink_to(tmp_path / "other" / MARKER)
    with pytest.raises(ParameterError, match="--resume"):
        Store(folder)


def full_disk(*_: object) -> None:
    raise OSError(28, "No space left on device")


def test_a_full_disk_is_told_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(ParameterError, match=r"--resume: .*No space left.*another folder"):
        Store(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_later_leaves_the_old_entry(store, monkeypatch):
    store.put("kind", KEY, 1)
    before = sorted(store.folder.iterdir())
    monkeypatch.setattr(Path, "replace", full_disk)
    with pytest.raises(ParameterError, match=r"--resume: .*No space left"):
        store.put("kind", KEY, 2)
    assert sorted(store.folder.iterdir()) == before
    assert store.get("kind", KEY) == 1


def test_a_folder_that_went_away_is_told(store):
    (store.folder / MARKER).unlink()
    store.folder.rmdir()
    assert store.get("kind", KEY) is None
    with pytest.raises(ParameterError, match=r"--resume: .*No such file"):
        store.put("kind", KEY, 1)


@pytest.mark.parametrize("first", [True, False], ids=["before the marker", "later"])
def test_leftovers_of_a_kill_are_cleared(first, tmp_path):
    name = f".{'0' * 64}.entry.{'0' * 16}.tmp"
    if first:
        name = f".{MARKER}.{'0' * 16}.tmp"
    else:
        Store(tmp_path)
    (tmp_path / name).write_bytes(b"half")
    Store(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == [MARKER]


def test_what_another_process_writes_is_left_alone(tmp_path):
    name = tmp_path / f".{'0' * 64}.entry.{'0' * 16}.tmp"
    with module._locked(name) as stream:
        stream.write(b"half")
        Store(tmp_path)
        assert name.exists()
    Store(tmp_path)
    assert not name.exists()


WRITER = """
import sys
from pathlib import Path
import numpy as np
from onnxcomp.search.store import Store
store = Store(Path(sys.argv[1]), "run")
print("go", flush=True)
for number in range(10**9):
    store.put("kind", number % 7, [number, np.full(50_000, number)])
"""


def test_a_kill_at_any_moment_leaves_whole_entries(tmp_path, caplog):
    rng = np.random.default_rng(0)
    read = 0
    for _ in range(2):
        with subprocess.Popen(
            [sys.executable, "-c", WRITER, tmp_path], stdout=subprocess.PIPE
        ) as writer:
            assert writer.stdout is not None
            writer.stdout.readline()
            signal.sigtimedwait([], float(rng.uniform(0.05, 0.3)))
            writer.kill()
        store = Store(tmp_path, "run")
        assert {f.suffix for f in tmp_path.iterdir()} <= {"", ".entry"}
        for key in range(7):
            found = store.get("kind", key)
            if found is not None:
                number, array = found
                assert number % 7 == key
                assert np.array_equal(array, np.full(50_000, number))
                read += 1
    assert read > 0
    assert not caplog.records
