"""Reading samples: npz, folders of npy and of images, and files made to do harm."""

import io
import os
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from onnxcomp.errors import DataError
from onnxcomp.sample_files import Preprocess, read_npy, read_npz
from onnxcomp.samples import load_samples

FLOAT32 = np.dtype(np.float32)


@dataclass(frozen=True)
class Spec:
    name: str
    shape: tuple[int | str | None, ...]
    dtype: np.dtype[Any] = FLOAT32


ONE = (Spec("x", ("N", 3)),)
TWO = (Spec("x", ("N", 3)), Spec("a/b:0", ("N",)))
IMAGE = (Spec("x", ("N", 3, None, None)),)
ARRAY = np.arange(12, dtype=np.float32).reshape(4, 3)


# --- npz and npy -------------------------------------------------------------------------


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("key", ["x", "arr_0"])
def test_npz(tmp_path: Path, save: Any, key: str) -> None:
    save(tmp_path / "s.npz", **{key: ARRAY, "labels": [3, 2, 1, 0]})
    samples = load_samples(str(tmp_path / "s.npz"), ONE)
    assert np.array_equal(samples.arrays["x"], ARRAY)
    assert samples.labels is not None
    assert samples.labels.tolist() == [3, 2, 1, 0]


def test_npz_of_several_inputs(tmp_path: Path) -> None:
    np.savez(tmp_path / "s.npz", **{"x": ARRAY, "a/b:0": ARRAY[:, 0]})
    samples = load_samples(tmp_path / "s.npz", TWO)
    assert np.array_equal(samples.arrays["a/b:0"], ARRAY[:, 0])
    with pytest.raises(DataError, match="no input 'a/b:0'; it has 'x'"):
        load_samples(tmp_path / "s.npz", ONE)


def test_folder_with_one_file_per_input(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", ARRAY)
    np.save(tmp_path / "a_b_0.npy", ARRAY[:, 0])
    np.save(tmp_path / "labels.npy", np.arange(4))
    samples = load_samples(tmp_path, TWO)
    assert np.array_equal(samples.arrays["a/b:0"], ARRAY[:, 0])
    assert samples.labels is not None
    assert samples.count == 4
    (tmp_path / "x.npy").unlink()
    with pytest.raises(DataError, match="no samples for input 'x'"):
        load_samples(tmp_path, TWO)


@pytest.mark.parametrize("rank", [1, 2])
def test_folder_with_one_file_per_sample(tmp_path: Path, rank: int) -> None:
    for index in (2, 0, 3, 1):
        np.save(tmp_path / f"part{index}.npy", ARRAY[index] if rank == 1 else ARRAY[[index]])
    np.save(tmp_path / "labels.npy", np.arange(4))
    samples = load_samples(tmp_path, ONE)
    assert np.array_equal(samples.arrays["x"], ARRAY)
    assert samples.labels is not None
    assert samples.labels.tolist() == [0, 1, 2, 3]


def npy_bytes(header: str, payload: bytes = b"", version: bytes = b"\x01\x00") -> bytes:
    text = header.encode() + b"\n"
    return b"\x93NUMPY" + version + len(text).to_bytes(2, "little") + text + payload


def pickled() -> bytes:
    stream = io.BytesIO()
    np.save(stream, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    return stream.getvalue()


HOSTILE = {
    "empty": b"",
    "text": b"hello, this is no array",
    "pickle": pickled(),
    "huge shape": npy_bytes(
        "{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000,)}"
    ),
    "overflow": npy_bytes("{'descr': '<f4', 'fortran_order': False, 'shape': (0, 10**30)}"),
    "zero": npy_bytes(f"{{'descr': '<f4', 'fortran_order': False, 'shape': (0, {10**30})}}"),
    "negative": npy_bytes(
        "{'descr': '<f4', 'fortran_order': False, 'shape': (-1, -1)}", b"1234"
    ),
    "code": npy_bytes("__import__('os').getpid()"),
    "unclosed": npy_bytes("{'descr': '<f4', 'shape': (((("),
    "structured": npy_bytes(
        "{'descr': [('a','<f4')],'fortran_order':False,'shape':(1,)}", b"1234"
    ),
    "version": npy_bytes("{}", version=b"\x03\x00"),
    "short": npy_bytes("{'descr': '<f4', 'fortran_order': False, 'shape': (2,)}", b"1234"),
    "long": npy_bytes("{'descr': '<f4', 'fortran_order': False, 'shape': (2,)}", b"1234" * 3),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_npy_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "x.npy").write_bytes(HOSTILE[name])
    with pytest.raises(DataError, match=r"x\.npy"):
        read_npy(tmp_path / "x.npy", max_bytes=10**12)
    with zipfile.ZipFile(tmp_path / "s.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x.npy", HOSTILE[name])
    with pytest.raises(DataError, match=r"s\.npz"):
        read_npz(tmp_path / "s.npz", max_bytes=10**12)


def test_a_zip_bomb_is_refused_before_it_is_unpacked(tmp_path: Path) -> None:
    path = tmp_path / "bomb.npz"
    np.savez_compressed(path, x=np.zeros((2_000_000, 3), np.float32))
    assert path.stat().st_size < 100_000
    with pytest.raises(DataError, match=r"24,000,\d+ bytes, the limit is 10,000,000"):
        load_samples(path, ONE, max_bytes=10_000_000)
    assert load_samples(path, ONE, max_bytes=30_000_000).count == 2_000_000


def test_limits_hold_for_folders(tmp_path: Path) -> None:
    for index in range(4):
        np.save(tmp_path / f"{index}.npy", ARRAY[index])
    with pytest.raises(DataError, match="the limit is 500"):
        load_samples(tmp_path, ONE, max_bytes=500)
    assert load_samples(tmp_path, ONE, max_bytes=600).count == 4


def test_damaged_npz_never_ends_in_another_error(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "s.npz", x=ARRAY)
    data = (tmp_path / "s.npz").read_bytes()
    refused = 0
    for position in range(len(data)):
        for mask in (0x01, 0xFF):
            damaged = bytearray(data)
            damaged[position] ^= mask
            (tmp_path / "d.npz").write_bytes(damaged)
            try:
                samples = load_samples(tmp_path / "d.npz", ONE)
            except DataError:
                refused += 1
            else:
                assert np.array_equal(samples.arrays["x"], ARRAY)
    assert refused > len(data)
    for length in range(len(data)):
        (tmp_path / "d.npz").write_bytes(data[:length])
        with pytest.raises(DataError):
            load_samples(tmp_path / "d.npz", ONE)


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "s.npz")
    with pytest.raises(DataError, match="not a regular file"):
        load_samples(tmp_path / "s.npz", ONE)
    with pytest.raises(DataError, match="cannot be read"):
        load_samples(tmp_path / "absent.npz", ONE)
    with pytest.raises(DataError, match=r"give an \.npz file"):
        load_samples(tmp_path / "model.txt", ONE)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"a folder of \.npy"):
        load_samples(tmp_path / "empty", ONE)


# --- images ------------------------------------------------------------------------------


def picture(height: int = 12, width: int = 16) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (height, width, 3), np.uint8)


def save_picture(path: Path, pixels: np.ndarray, **options: Any) -> None:
    Image.fromarray(pixels).save(path, **options)


def test_images_are_scaled_normalised_and_laid_out(tmp_path: Path) -> None:
    pixels = picture()
    save_picture(tmp_path / "b.bmp", pixels[::-1])
    save_picture(tmp_path / "a.png", pixels)
    np.save(tmp_path / "labels.npy", [7, 8])
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    yaml = tmp_path / "p.yaml"
    yaml.write_text(f"scale: 1/255\nmean: {list(mean)}\nstd: {list(std)}\ncolor: rgb\n")
    samples = load_samples(tmp_path, IMAGE, preprocess=yaml)
    expected = ((pixels / 255 - mean) / std).transpose(2, 0, 1)
    assert samples.arrays["x"].shape == (2, 3, 12, 16)
    assert samples.arrays["x"].flags.c_contiguous
    assert np.allclose(samples.arrays["x"][0], expected, rtol=1e-5, atol=1e-5)
    assert np.allclose(samples.arrays["x"][1], expected[:, ::-1], rtol=1e-5, atol=1e-5)
    assert not np.allclose(samples.arrays["x"][0], expected[::-1], rtol=1e-5, atol=1e-5)
    assert samples.labels is not None
    assert samples.labels.tolist() == [7, 8]


def test_bgr_gray_and_nhwc(tmp_path: Path) -> None:
    save_picture(tmp_path / "a.png", picture())
    wide = (Spec("x", (1, 12, 16, 3)),)
    bgr = load_samples(tmp_path, wide, preprocess=Preprocess(color="bgr", layout="nhwc"))
    assert np.array_equal(bgr.arrays["x"][0], picture()[:, :, ::-1].astype(np.float32))
    gray_input = (Spec("x", ("N", 1, 12, 16), np.dtype(np.uint8)),)
    gray = load_samples(tmp_path, gray_input, preprocess=Preprocess(color="gray", mean=[0]))
    luma = picture() @ np.array([0.299, 0.587, 0.114])
    assert np.abs(gray.arrays["x"][0, 0] - luma).max() <= 1


def test_resize_and_crop(tmp_path: Path) -> None:
    pixels = picture(20, 40)
    save_picture(tmp_path / "a.png", pixels)
    short = load_samples(tmp_path, IMAGE, preprocess=Preprocess(resize=10))
    assert short.arrays["x"].shape == (1, 3, 10, 20)
    exact = load_samples(tmp_path, IMAGE, preprocess=Preprocess(resize=(8, 9)))
    expected = np.asarray(Image.fromarray(pixels).resize((9, 8), Image.Resampling.BILINEAR))
    assert np.array_equal(exact.arrays["x"][0], expected.transpose(2, 0, 1).astype(np.float32))
    crop = load_samples(tmp_path, IMAGE, preprocess=Preprocess(crop=[4, 6]))
    assert np.array_equal(crop.arrays["x"][0], pixels[8:12, 17:23].transpose(2, 0, 1))
    with pytest.raises(DataError, match=r"20x40 .*smaller than the crop 30x30"):
        load_samples(tmp_path, IMAGE, preprocess=Preprocess(crop=30))


def test_images_of_several_sizes_need_resizing(tmp_path: Path) -> None:
    save_picture(tmp_path / "a.jpg", picture())
    save_picture(tmp_path / "b.webp", picture(10, 16))
    with pytest.raises(DataError, match=r"b\.webp: is 10x16.*are 12x16; set 'resize'"):
        load_samples(tmp_path, IMAGE, preprocess=Preprocess())
    samples = load_samples(tmp_path, IMAGE, preprocess=Preprocess(resize=[8, 8]))
    assert samples.arrays["x"].shape == (2, 3, 8, 8)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sclae: 1", "unknown keys 'sclae'; known are resize, crop, color, scale"),
        ("- 1", "must hold keys"),
        ("", "must hold keys"),
        ("scale: [", "is not YAML"),
        ("!!python/object/apply:os.getpid []", "is not YAML"),
        ("color: cmyk", "'color' must be rgb, bgr or gray; got 'cmyk'"),
        ("color: [rgb]", "'color' must be"),
        ("layout: chw", "'layout' must be nchw or nhwc"),
        ("scale: .nan", "'scale' must be a finite number"),
        ("scale: 1/0", "'scale' must be a finite number"),
        ("scale: true", "'scale' must be a finite number"),
        ("std: 0", "'std' must be positive"),
        ("mean: [1, 2]", "'mean' must be one number or 3 of them"),
        ("color: gray\nmean: [1, 2, 3]", "'mean' must be one number or 1 of them"),
        ("resize: 0", "'resize' must be a positive integer"),
        ("resize: 1.5", "'resize' must be a positive integer"),
        ("crop: [1, 2, 3]", "'crop' must be a positive integer"),
        ("#" * 70_000, "the limit is 65,536"),
    ],
)
def test_preprocessing_files_are_checked(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "p.yaml"
    path.write_text(text)
    with pytest.raises(DataError, match=message) as caught:
        Preprocess.load(path)
    assert "p.yaml" in str(caught.value)


def test_numbers_in_any_yaml_form(tmp_path: Path) -> None:
    path = tmp_path / "p.yaml"
    path.write_text("scale: 1e-3\nmean: [1, 2.5, 1/4]\nresize: [2, 3]\n")
    found = Preprocess.load(path)
    assert found == Preprocess(scale=0.001, mean=(1.0, 2.5, 0.25), resize=(2, 3))


def test_a_yaml_of_nested_aliases_is_refused_quickly(tmp_path: Path) -> None:
    lines = ["a0: &a0 [1, 1]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 40)]
    path = tmp_path / "p.yaml"
    path.write_text("\n".join([*lines, "mean: *a39"]))
    with pytest.raises(DataError, match="unknown keys"):
        Preprocess.load(path)


def test_image_folders_are_refused_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_picture(tmp_path / "a.png", picture())
    with pytest.raises(DataError, match="needs a preprocessing file"):
        load_samples(tmp_path, IMAGE)
    with pytest.raises(DataError, match="inputs 'x', 'a/b:0'"):
        load_samples(tmp_path, TWO, preprocess=Preprocess())
    with pytest.raises(DataError, match="the limit is 2,000"):
        load_samples(tmp_path, IMAGE, preprocess=Preprocess(), max_bytes=2_000)
    with pytest.raises(DataError, match="the limit is 8,000,000,000"):
        load_samples(tmp_path, IMAGE, preprocess=Preprocess(resize=100_000))
    np.savez(tmp_path / "s.npz", x=ARRAY)
    with pytest.raises(DataError, match="holds no images"):
        load_samples(tmp_path / "s.npz", ONE, preprocess=Preprocess())
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(DataError, match=r"a\.png: has too many pixels"):
        load_samples(tmp_path, IMAGE, preprocess=Preprocess())
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(DataError, match=r"pip install onnxcomp\[images\]"):
        load_samples(tmp_path, IMAGE, preprocess=Preprocess())


def test_a_damaged_image_is_named(tmp_path: Path) -> None:
    save_picture(tmp_path / "a.png", picture(64, 64))
    data = (tmp_path / "a.png").read_bytes()
    for damaged in (b"", b"not an image", data[: len(data) // 2]):
        (tmp_path / "a.png").write_bytes(damaged)
        with pytest.raises(DataError, match=r"a\.png: cannot be decoded"):
            load_samples(tmp_path, IMAGE, preprocess=Preprocess())
