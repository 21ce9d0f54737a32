"""The store of a run: what comes back is what was put in, and nothing else ever comes back."""

import logging
import math
import os
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from onnxcomp.errors import ParameterError
from onnxcomp.search import store as module
from onnxcomp.search.store import Store
from tests.search.cases import residual

DIGITS = Path(__file__).parents[2] / "models" / "digits" / "digits.onnx"
KEY = ("conv1", 3, 0.5)
VALUE = {"loss": 0.1, "curve": np.arange(6.0), "order": (3, 1, 2)}


@pytest.fixture
def store(tmp_path) -> Store:
    return Store(tmp_path / "state", "run")


def entries(store: Store) -> list[Path]:
    assert store.folder is not None
    return sorted(store.folder.glob("*.entry"))


def same(found: object, wanted: object) -> bool:
    """Whether two values are equal in value, type, dtype, and every bit of their floats."""
    if type(found) is not type(wanted):
        return False
    if isinstance(wanted, np.ndarray):
        assert isinstance(found, np.ndarray)
        layout = found.dtype == wanted.dtype and found.shape == wanted.shape
        return layout and found.tobytes() == wanted.tobytes()
    if isinstance(wanted, list | tuple):
        return len(found) == len(wanted) and all(map(same, found, wanted))
    if isinstance(wanted, dict):
        return same(list(found.items()), list(wanted.items()))
    if isinstance(wanted, float | np.generic):
        return np.asarray(found).tobytes() == np.asarray(wanted).tobytes()
    return found == wanted


@pytest.mark.parametrize(
    "value",
    [
        *(0, 1, True, -(2**80), "text\udc80\x00", [], {}, (), [None, "a"]),
        *(0.1, 1 / 3, 2.3e-308, 1.7976931348623157e308, -0.0, math.inf, -math.inf, math.nan),
        *(np.float32(0.1), np.float64(0.1), np.int64(-1), np.bool_(True), np.float16(0.1)),
        ml_dtypes.bfloat16(0.1),
        (1, (2.5, [3, {"a": (4,)}])),
        {1: "int", "1": "str", (2, "b"): 0.25, 1.5: None},
        {"array": {"scalar": {"tuple": []}}},
        np.arange(12, dtype=np.int32).reshape(3, 4),
        np.arange(12, dtype=np.float32).reshape(3, 4).T,
        np.arange(24.0).reshape(2, 3, 4)[:, ::2],
        np.array(2.5),
        np.empty((0, 3), np.uint8),
        np.array([True, False]),
        np.ones(3, ml_dtypes.bfloat16),
        {"a": [np.array([math.nan, -0.0, math.inf]), {"b": np.arange(2)}]},
    ],
    ids=repr,
)
def test_values_come_back_exactly(store, value):
    store.put("kind", KEY, value)
    assert same(store.get("kind", KEY), value)


def test_the_comparison_bites():
    assert not same(1, 1.0)
    assert not same((1,), [1])
    assert not same(0.0, -0.0)
    assert not same(0.1, float(np.float32(0.1)))
    assert not same(np.float32(0.5), 0.5)
    assert not same(np.zeros(2), np.zeros(2, np.float32))
    assert not same({1: 2}, {"1": 2})


def test_arrays_keep_their_order(store):
    """BLAS rounds differently on a transposed operand."""
    store.put("kind", 0, [np.ones((3, 4)), np.ones((4, 3)).T])
    rows, columns = store.get("kind", 0)
    assert rows.flags.c_contiguous
    assert columns.flags.f_contiguous
    assert columns.flags.writeable


@pytest.mark.parametrize(
    "value",
    [None, {1, 2}, object(), b"bytes", np.array(["a"]), np.array([1.0], ">f8"), [Path()]],
)
@pytest.mark.parametrize("kept", [True, False], ids=["folder", "nothing"])
def test_other_values_are_refused(value, kept, tmp_path):
    with pytest.raises(TypeError, match=r"Store\.put"):
        Store(tmp_path if kept else None).put("kind", KEY, value)


def test_no_folder_keeps_nothing():
    nothing = Store(None)
    nothing.put("kind", KEY, VALUE)
    nothing.put_model("kind", KEY, residual())
    assert nothing.get("kind", KEY) is nothing.get_model("kind", KEY) is None
    assert nothing.scoped("part").get("kind", KEY) is None


def test_an_entry_belongs_to_its_question(store):
    store.put("kind", KEY, 1)
    assert store.get("other", KEY) is None
    for key in ("conv1", ("conv1", 3, 0.25), ("conv1", 3), ("conv1", 3.0, 0.5), (KEY,)):
        assert store.get("kind", key) is None
    assert store.get_model("kind", KEY) is None
    assert Store(store.folder, "another run").get("kind", KEY) is None
    assert store.scoped("part").get("kind", KEY) is None
    assert store.get("kind", ("conv1", np.int64(3), np.float64(0.5))) == 1


def test_scopes_are_independent(store):
    parts = [
        store.scoped("a"),
        store.scoped("b"),
        store.scoped("a", 1),
        store.scoped("a").scoped(1),
    ]
    for number, part in enumerate(parts):
        part.put("kind", KEY, number)
    assert [part.get("kind", KEY) for part in parts] == [0, 1, 2, 3]
    assert store.scoped("b").get("kind", KEY) == 1


def test_a_value_is_replaced(store):
    store.put("kind", KEY, 1)
    store.put("kind", KEY, 2)
    assert store.get("kind", KEY) == 2
    assert len(entries(store)) == 1


def test_keys_are_plain_values(store):
    with pytest.raises(TypeError, match="plain values"):
        store.get("kind", (Path(),))


# Attacks: every file that is not exactly what was put there is ignored, told, and replaced.


def assert_ignored(store: Store, file: Path, caplog) -> None:
    """The value is not there, a warning names the file, and a new value takes its place."""
    caplog.clear()
    with caplog.at_level(logging.WARNING, "onnxcomp"):
        assert store.get("kind", KEY) is None
    assert [file.name in record.getMessage() for record in caplog.records] == [True]
    store.put("kind", KEY, VALUE)
    assert same(store.get("kind", KEY), VALUE)
    assert file.is_file()
    assert not file.is_symlink()


@pytest.fixture
def entry(store) -> Path:
    store.put("kind", KEY, VALUE)
    (file,) = entries(store)
    return file


def test_no_flipped_bit_is_trusted(store, entry, caplog):
    whole = entry.read_bytes()
    rng = np.random.default_rng(0)
    for position in range(len(whole)):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << int(rng.integers(8))
        entry.write_bytes(damaged)
        assert store.get("kind", KEY) is None, position
    assert_ignored(store, entry, caplog)
    assert entry.read_bytes() == whole


def test_no_cut_file_is_trusted(store, entry, caplog):
    whole = entry.read_bytes()
    for size in range(0, len(whole), 3):
        entry.write_bytes(whole[:size])
        assert store.get("kind", KEY) is None, size
    entry.write_bytes(whole + b"\0")
    assert_ignored(store, entry, caplog)


def test_models_are_attacked_in_vain(store):
    model = residual()
    store.put_model("best", KEY, model)
    (file,) = entries(store)
    whole = file.read_bytes()
    rng = np.random.default_rng(0)
    for position in rng.integers(len(whole), size=60):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << int(rng.integers(8))
        file.write_bytes(damaged)
        assert store.get_model("best", KEY) is None, position
        file.write_bytes(whole[:position])
        assert store.get_model("best", KEY) is None, position
    file.write_bytes(whole)
    assert store.get_model("best", KEY) is not None


@pytest.mark.parametrize("how", ["another key", "another kind", "another run", "a model"])
def test_swapped_entries_are_ignored(how, store, entry, caplog):
    other = Store(store.folder, "another run") if how == "another run" else store
    if how == "a model":
        other.put_model("kind", KEY, residual())
    else:
        kind, key = ("other" if how == "another kind" else "kind"), KEY
        other.put(kind, "other" if how == "another key" else key, 1)
    (foreign,) = [file for file in entries(store) if file != entry]
    foreign.replace(entry)
    assert_ignored(store, entry, caplog)


@pytest.mark.parametrize("kind", ["link", "dangling link", "fifo"])
def test_no_link_or_pipe_is_followed(kind, store, entry, caplog, tmp_path):
    target = tmp_path / "target"
    if kind == "link":
        target.write_bytes(entry.read_bytes())
    entry.unlink()
    if kind == "fifo":
        os.mkfifo(entry)
    else:
        entry.symlink_to(target)
    before = target.read_bytes() if target.exists() else None
    assert_ignored(store, entry, caplog)
    assert (target.read_bytes() if target.exists() else None) == before


def test_a_folder_in_the_place_of_an_entry_is_told(store, entry):
    entry.unlink()
    entry.mkdir()
    assert store.get("kind", KEY) is None
    with pytest.raises(ParameterError, match=r"--resume: .*directory; make room"):
        store.put("kind", KEY, 1)


def forged(question: bytes, header: bytes, *blocks: bytes) -> bytes:
    """An entry with right checksums, as one who knows the format can make it."""
    digest = module.hashlib.sha256(header).digest()
    return module._PREFIX.pack(module._MAGIC, len(header), digest) + header + b"".join(blocks)


@pytest.mark.parametrize(
    ("value", "arrays"),
    [
        ("[" * 100_000, "[]"),
        ("[" * 100_000 + "]" * 100_000, "[]"),
        ("1" * 100_000, "[]"),
        ('{"array": 0}', "[]"),
        ('{"array": "x"}', "[]"),
        ('{"pickle": "cos\\nsystem"}', "[]"),
        ('{"dict": [[[], 1]]}', "[]"),
        ('{"dict": 5}', "[]"),
        ('{"scalar": ["object", 1]}', "[]"),
        ('{"a": 1, "b": 2}', "[]"),
        ("{}", "[]"),
        ("1", "5"),
        ("1", "[5]"),
        ("1", '[["object", [1], "C", ""]]'),
        ("1", '[["float32", [1000000000000], "C", ""]]'),
        ("1", '[["float32", [-1, -4], "C", ""]]'),
        ("1", '[["float32", [0, 10000000000000000000], "C", ""]]'),
        ("1", '[["float32", [0.5], "C", ""]]'),
        ("1", '[["uint8", [0], "K", ""]]'),
        ("1", f'[["uint8", {[1] * 1000}, "C", ""]]'),
        ("1", '[["uint8", [0], "C", null]]'),
        ("1", '[["uint8", [0]]]'),
    ],
    ids=range(22),
)
def test_forged_values_are_ignored(value, arrays, store, entry, caplog):
    question = module._canonical(["run", "value", "kind", KEY])
    text = module.json.dumps(question.decode())
    header = f'{{"question": {text}, "value": {value}, "arrays": {arrays}}}'
    entry.write_bytes(forged(question, header.encode()))
    assert_ignored(store, entry, caplog)


def test_the_forger_knows_the_format(store, entry):
    question = module._canonical(["run", "value", "kind", KEY])
    text = module.json.dumps(question.decode())
    header = f'{{"question": {text}, "value": 5, "arrays": []}}'
    entry.write_bytes(forged(question, header.encode()))
    assert store.get("kind", KEY) == 5


@pytest.mark.parametrize("header", [b"", b"5", b"[]", b"{}", b"null", b"\xff", b"{" * 10**6])
def test_forged_headers_are_ignored(header, store, entry, caplog):
    entry.write_bytes(forged(b"", header))
    assert_ignored(store, entry, caplog)


def test_huge_files_are_not_read(store, entry, caplog):
    """A header of 16 EB is claimed, in a file of 1 TB without blocks."""
    entry.write_bytes(module._PREFIX.pack(module._MAGIC, 2**64 - 1, bytes(32)))
    os.truncate(entry, 2**40)
    assert_ignored(store, entry, caplog)
    entry.write_bytes(module._PREFIX.pack(module._MAGIC, module._HEADER_BYTES + 1, bytes(32)))
    os.truncate(entry, 2**40)
    assert_ignored(store, entry, caplog)


def test_a_header_has_an_end(store):
    with pytest.raises(ValueError, match="keep its numbers as arrays"):
        store.put("kind", KEY, "x" * module._HEADER_BYTES)
    assert entries(store) == []
