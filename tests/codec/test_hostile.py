"""Damaged and forged packed files: no damage goes unseen, and nothing worse than a refusal.

Damage is anything that happens to the bytes; it must be refused. A forger mends the checksums:
what comes out is then any model, but within the limits, and an error is the typed one.
"""

import hashlib
import random
import tracemalloc
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest

from onnxcomp import codec
from onnxcomp.codec import container, rans
from onnxcomp.codec.coders import CoderId, compress, decompress
from onnxcomp.codec.container import PackedFile
from onnxcomp.codec.head import Head
from onnxcomp.codec.records import Kind, Part, Record, layout_of
from onnxcomp.codec.tables import Tables
from onnxcomp.errors import InvalidModelError
from onnxcomp.loading import LoadLimits
from tests.codec.models import every_kind, model_of

LIMITS = LoadLimits(total_bytes=2**21)
PREFIX, BEGIN = container._PREFIX, container._HEAD_BEGIN
Change = Callable[[bytearray, random.Random], None]


@pytest.fixture(scope="module", params=["balanced", "max"])
def packed(request, tmp_path_factory) -> bytes:
    if request.param == "max":
        pytest.importorskip("numba", reason="the profile max needs numba")
    path = tmp_path_factory.mktemp("packed") / "model.onnxc"
    codec.pack(every_kind(), path, request.param)
    return path.read_bytes()


def outcome(data: bytes, path: Path) -> str | None:
    """The digest of the model in a file, or None where it is refused."""
    path.write_bytes(data)
    try:
        return codec.unpack(path, limits=LIMITS).digest
    except InvalidModelError:
        return None


def flip(data: bytearray, rng: random.Random) -> None:
    for _ in range(rng.choice((1, 1, 1, 2, 8))):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)


def overwrite(data: bytearray, rng: random.Random) -> None:
    at = rng.randrange(len(data))
    new = rng.choice((b"\0", b"\xff", b"\x7f\xff\xff\xff", rng.randbytes(rng.randint(1, 40))))
    data[at : at + len(new)] = new[: len(data) - at]


def insert(data: bytearray, rng: random.Random) -> None:
    at = rng.randrange(len(data) + 1)
    data[at:at] = rng.choice(
        (b"\0", rng.randbytes(rng.randint(1, 9)), data[at : at + 20] or b"1")
    )


def remove(data: bytearray, rng: random.Random) -> None:
    at = rng.randrange(len(data))
    del data[at : at + rng.choice((1, 2, 16, len(data)))]


def swap(data: bytearray, rng: random.Random) -> None:
    length = rng.choice((1, 2, 4, 64))
    one, two = (rng.randrange(len(data) - length) for _ in range(2))
    data[one : one + length], data[two : two + length] = (
        data[two : two + length],
        data[one : one + length],
    )


CHANGES: list[Change] = [flip, overwrite, insert, remove, swap]


def damage(original: bytes, path: Path, count: int, seed: int) -> None:
    rng = random.Random(seed)
    for number in range(count):
        data = bytearray(original)
        rng.choice(CHANGES)(data, rng)
        if data != original:
            assert outcome(bytes(data), path) is None, f"damage {number} of seed {seed} unseen"


def forge(original: bytes, path: Path, count: int, seed: int) -> int:
    """Change what the checksums protect, mend them, and return how many were refused."""
    rng, refused = random.Random(seed), 0
    _, small, raw, _, decoded = PREFIX.unpack(original[: PREFIX.size])
    head = decompress(original[BEGIN : BEGIN + small], raw)
    with_crcs = 4 * len(opened(original, path))
    for _ in range(count):
        new_head = bytearray(head)
        payload = bytearray(original[BEGIN + small :])
        where = rng.random()
        if where < 0.6:
            rng.choice(CHANGES)(new_head, rng)
        elif where < 0.8:
            rng.choice((flip, overwrite, swap))(payload, rng)
            new_head[-with_crcs:] = mended(original, bytes(payload), path)
        else:
            decoded = rng.choice((decoded, 0, decoded + 1, 2**63, 2**20))
        data = sealed(bytes(new_head), bytes(payload), decoded)
        refused += outcome(data, path) is None
    return refused


def opened(original: bytes, path: Path) -> list:
    path.write_bytes(original)
    with PackedFile(path) as file:
        return list(file.head.segments)


def mended(original: bytes, payload: bytes, path: Path) -> bytes:
    crcs, begin = b"", 0
    for segment in opened(original, path):
        crcs += zlib.crc32(payload[begin : begin + segment.length]).to_bytes(4, "little")
        begin += segment.length
    return crcs


def sealed(head: bytes, payload: bytes, decoded: int) -> bytes:
    small = compress(head)
    total = BEGIN + len(small) + len(payload)
    prefix = PREFIX.pack(container.PACKED_MAGIC, len(small), len(head), total, decoded)
    return prefix + hashlib.sha256(prefix + small).digest() + small + payload


def test_the_tests_bite(packed, tmp_path):
    """What is not changed comes back, so that the refusals mean something."""
    path = tmp_path / "model.onnxc"
    assert outcome(packed, path) == every_kind().digest
    _, small, raw, _, decoded = PREFIX.unpack(packed[: PREFIX.size])
    head = decompress(packed[BEGIN : BEGIN + small], raw)
    payload = packed[BEGIN + small :]
    assert sealed(head, payload, decoded) == packed
    assert mended(packed, payload, path) == head[-4 * len(opened(packed, path)) :]


def test_no_damage_goes_unseen(packed, tmp_path):
    damage(packed, tmp_path / "model.onnxc", 9000, seed=0)


@pytest.mark.parametrize("numba", [True, False])
def test_forged_files_are_refused_or_read(packed, numba, tmp_path, monkeypatch):
    if not numba:
        monkeypatch.setattr(rans, "kernels", lambda: None)
    count = 1000 if numba else 200
    refused = forge(packed, tmp_path / "model.onnxc", count, seed=1)
    assert refused > 0.5 * count


def test_memory_stays_within_the_cap(packed, tmp_path):
    """A file of 30 kB that may decode to 2 MiB never takes more than that several times."""
    forge(packed, tmp_path / "model.onnxc", 5, seed=2)
    tracemalloc.start()
    forge(packed, tmp_path / "model.onnxc", 150, seed=3)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 10 * LIMITS.total_bytes


BITS = np.array([0, 1], np.int8)
ZEROS = Record(Kind.RANKS, (Part(CoderId.CONSTANT, 2**10, 128),))


def forged(tmp_path, records, layouts=(), shapes=((1, 2**22),), codebooks=(BITS,)) -> Path:
    """A file of int8 tensors that nothing but its records says anything about."""
    model = model_of({f"w{i}": np.zeros(shape, np.int8) for i, shape in enumerate(shapes)})
    skeleton = model.to_proto(external=True)
    head = Head(skeleton, Tables([], [], layouts), codebooks, records, []).to_bytes()
    path = tmp_path / "forged.onnxc"
    path.write_bytes(sealed(head, b"", sum(int(np.prod(shape)) for shape in shapes)))
    return path


@pytest.mark.parametrize(
    ("detail", "size", "reason"),
    [(0, 2**10, None), (1, 2**10, "none before"), (9, 2**10, "none before"), (0, 99, "size")],
)
def test_copies_are_of_an_earlier_tensor_of_their_size(detail, size, reason, tmp_path):
    copy = Record(Kind.COPY, (), detail=detail)
    path = forged(tmp_path, [ZEROS, copy], shapes=((2**10,), (size,)))
    if reason is None:
        assert not any(array.any() for array in codec.unpack(path).weights.values())
    else:
        with pytest.raises(InvalidModelError, match=reason):
            codec.unpack(path)


def test_copies_of_copies_are_refused(tmp_path):
    copies = [Record(Kind.COPY, (), detail=i) for i in range(2)]
    with pytest.raises(InvalidModelError, match="none before"):
        codec.unpack(forged(tmp_path, [ZEROS, *copies], shapes=((2**10,),) * 3))


def test_codebooks_belong_to_tensors_and_are_smaller(tmp_path):
    """A grid of 4,096 values takes few bytes of a head, and 4 kB or more in memory."""
    unused, large = [BITS, BITS + 1], [np.arange(-128, 128).astype(np.int8)]
    shapes = ((2**10,),) * 2
    with pytest.raises(InvalidModelError, match="belongs to no tensor"):
        codec.unpack(forged(tmp_path, [ZEROS, ZEROS], shapes=shapes, codebooks=unused))
    small = Record(Kind.RANKS, (Part(CoderId.CONSTANT, 100, 128),))
    with pytest.raises(InvalidModelError, match="256, above 100"):
        codec.unpack(forged(tmp_path, [small], shapes=((100,),), codebooks=large))


def test_contradictions_in_the_graph_are_refused(tmp_path):
    model = every_kind()
    (small,) = (t for t in model.skeleton.graph.initializer if t.name == "small")
    codec.pack(model, tmp_path / "model.onnxc")
    small.data_type = onnx.TensorProto.INT32
    skeleton = model.to_proto(external=True)
    for tensor in skeleton.graph.initializer:
        if tensor.name == "small":
            tensor.raw_data = bytes(24)
    with PackedFile(tmp_path / "model.onnxc") as file:
        head, size = file.head, file.size
        first = size - sum(segment.length for segment in head.segments)
    payload = (tmp_path / "model.onnxc").read_bytes()[first:]
    forged_head = replace(head, skeleton=skeleton).to_bytes()
    decoded = sum(a.nbytes for a in model.weights.values() if a.nbytes > 64)
    (tmp_path / "forged.onnxc").write_bytes(sealed(forged_head, payload, decoded))
    with pytest.raises(InvalidModelError, match="'small' with dims"):
        codec.unpack(tmp_path / "forged.onnxc")


def test_runs_take_memory_of_their_tensor_alone(tmp_path):
    size = 2**22
    parts = (Part(CoderId.CONSTANT, size, 0), Part(CoderId.CONSTANT, size, 129))
    path = forged(tmp_path, [Record(Kind.RUNS, parts, 0, 128)])
    tracemalloc.start()
    ((_, array),) = codec.stream(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert array.all()
    assert peak < 5 * size + 2**24


def test_an_output_too_large_for_mixing_is_refused(tmp_path, monkeypatch):
    record = Record(Kind.RANKS, (Part(CoderId.MIXING, 2**22),))
    layouts = [layout_of((1, 2**22), BITS)]
    monkeypatch.setattr("onnxcomp.codec.records.MOST_INPUTS", 2**22 - 1)
    with pytest.raises(InvalidModelError, match="too large for its coder"):
        codec.unpack(forged(tmp_path, [record], layouts))


def test_truncation_at_every_byte(tmp_path):
    path = tmp_path / "model.onnxc"
    codec.pack(model_of({"w": np.arange(100, dtype=np.float32)}), path)
    original = path.read_bytes()
    for length in range(len(original)):
        assert outcome(original[:length], path) is None
    assert outcome(original + b"\0", path) is None


@pytest.mark.parametrize("name", ["folder", "pipe", "link", "absent"])
def test_what_is_no_ordinary_file_is_refused(name, packed, tmp_path):
    import os

    path = tmp_path / name
    if name == "folder":
        path.mkdir()
    elif name == "pipe":
        os.mkfifo(path)
    elif name == "link":
        path.symlink_to("/dev/zero")
    with pytest.raises(InvalidModelError):
        codec.unpack(path)


def test_external_data_in_the_graph_are_refused(tmp_path):
    model = every_kind()
    tensor = model.skeleton.graph.initializer[-1]
    assert tensor.name == "words"
    tensor.external_data.add(key="location", value="../secret")
    codec.pack(model, tmp_path / "model.onnxc")
    with pytest.raises(InvalidModelError, match="'words' refers to another file"):
        codec.unpack(tmp_path / "model.onnxc")


@pytest.mark.parametrize("attribute", ["t", "sparse_tensor", "sparse_tensors"])
def test_external_data_in_attributes_are_refused(attribute, tmp_path):
    model = every_kind()
    held = model.skeleton.graph.node[0].attribute.add(name="held")
    tensor = onnx.TensorProto(name="inner")
    tensor.external_data.add(key="location", value="../secret")
    if attribute == "t":
        held.t.CopyFrom(tensor)
    elif attribute == "sparse_tensor":
        held.sparse_tensor.values.CopyFrom(tensor)
    else:
        held.sparse_tensors.add().indices.CopyFrom(tensor)
    codec.pack(model, tmp_path / "model.onnxc")
    with pytest.raises(InvalidModelError, match="'inner' refers to another file"):
        codec.unpack(tmp_path / "model.onnxc")


@pytest.mark.heavy
@pytest.mark.parametrize("seed", range(10, 20))
def test_a_million_damages_and_a_hundred_thousand_forgeries(seed, packed, tmp_path):
    damage(packed, tmp_path / "model.onnxc", 50_000, seed)
    assert forge(packed, tmp_path / "model.onnxc", 5000, seed) > 2500
