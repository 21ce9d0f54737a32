"""Arrays from files that are not trusted: `.npz`, folders of `.npy`, folders of images.

Nothing is unpickled, and sizes are added up before anything is read: for `.npz` the sizes that
the zip directory declares (an entry never yields more than that), for `.npy` the header must
agree with the length of the file, for images the sizes of the files and of the result.
"""

import lzma
import math
import reprlib
import stat
import tokenize
import warnings
import zipfile
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, fields
from fractions import Fraction
from pathlib import Path
from typing import IO, Any, Literal, Self

import numpy as np
import yaml
from numpy.typing import NDArray

from onnxcomp.errors import DataError

Array = NDArray[Any]

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp"})
_PILLOW_FORMATS = ("JPEG", "PNG", "WEBP", "BMP")
_MODES = {"rgb": "RGB", "bgr": "RGB", "gray": "L"}
_MAX_YAML_BYTES = 64 * 1024
_ZIP_ERRORS = (
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    EOFError,
    NotImplementedError,  # an unknown compression
    OSError,
    RuntimeError,  # encryption
)
_HEADER_ERRORS = (ValueError, TypeError, SyntaxError, OverflowError, tokenize.TokenError)


def check_sizes(files: Iterable[Path], max_bytes: int) -> None:
    """Refuse what is not a regular file, or files larger than `max_bytes` together."""
    total = 0
    for file in files:
        try:
            status = file.stat()
        except OSError as error:
            raise DataError(f"{file}: cannot be read: {error.strerror}") from error
        if not stat.S_ISREG(status.st_mode):
            raise DataError(f"{file}: is not a regular file")
        total += status.st_size
        _check_total(file, total, max_bytes)


def read_npz(path: Path, *, max_bytes: int) -> dict[str, Array]:
    """Return all arrays of an `.npz` file by key.

    Raises:
        DataError: the file is damaged, larger than `max_bytes` unpacked, or holds objects.
    """
    check_sizes([path], max_bytes)
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            _check_total(path, sum(entry.file_size for entry in entries), max_bytes)
            arrays = {}
            for entry in entries:
                with archive.open(entry) as stream:
                    array = _read_array(stream, entry.file_size, f"{path}[{entry.filename}]")
                arrays[entry.filename.removesuffix(".npy")] = array
            return arrays
    except _ZIP_ERRORS as error:
        raise DataError(f"{path}: is not a sound .npz file: {error}") from error


def read_npy(path: Path, *, max_bytes: int) -> Array:
    """Return the array of one `.npy` file; raises `DataError` as `read_npz` does."""
    check_sizes([path], max_bytes)
    with path.open("rb") as stream:
        return _read_array(stream, path.stat().st_size, str(path))


def _check_total(path: Path, total: int, max_bytes: int) -> None:
    if total > max_bytes:
        raise DataError(
            f"{path}: the samples take {total:,} bytes, the limit is {max_bytes:,}; "
            "give fewer samples or raise max_bytes"
        )


def _read_array(stream: IO[bytes], size: int, where: str) -> Array:
    """Read one array after checking that its header announces exactly `size` bytes."""
    readers = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    try:
        version = np.lib.format.read_magic(stream)
        if version not in readers:
            raise DataError(f"{where}: .npy version {version} is not supported")
        shape, _, dtype = readers[version](stream)
        if dtype.hasobject or dtype.kind not in "biuf":
            raise DataError(f"{where}: holds {dtype}; save plain numbers instead")
        announced = stream.tell() + math.prod(shape) * dtype.itemsize
        if announced != size or min(shape, default=0) < 0:
            raise DataError(
                f"{where}: shape {shape} of {dtype} does not fit its {size:,} bytes"
            )
        stream.seek(0)
        return np.asarray(np.lib.format.read_array(stream, allow_pickle=False))
    except _HEADER_ERRORS as error:
        raise DataError(f"{where}: is not a sound .npy array: {error}") from error


@dataclass(frozen=True)
class Preprocess:
    """How an image file becomes one sample: value = (pixel * scale - mean) / std.

    Pixels are 0..255. Order: colour, resize, centre crop, scale, mean and std, layout.

    Attributes:
        resize: (height, width), or the length in pixels of the shorter side; bilinear.
        crop: (height, width) or the side of a square, cut from the centre.
        color: order of the channels; "gray" has one.
        scale: factor on the pixel; a text such as "1/255" is taken too.
        mean: one number, or one per channel in the order of `color`; after scaling.
        std: likewise, positive.
        layout: "nchw" or "nhwc".
    """

    resize: int | tuple[int, int] | None = None
    crop: int | tuple[int, int] | None = None
    color: Literal["rgb", "bgr", "gray"] = "rgb"
    scale: float = 1.0
    mean: float | tuple[float, ...] = 0.0
    std: float | tuple[float, ...] = 1.0
    layout: Literal["nchw", "nhwc"] = "nchw"

    def __post_init__(self) -> None:
        if self.color not in tuple(_MODES):
            raise _wrong("color", "rgb, bgr or gray", self.color)
        if self.layout not in ("nchw", "nhwc"):
            raise _wrong("layout", "nchw or nhwc", self.layout)
        for name in ("resize", "crop"):
            object.__setattr__(self, name, _size(name, getattr(self, name)))
        object.__setattr__(self, "scale", _number("scale", self.scale))
        for name in ("mean", "std"):
            object.__setattr__(self, name, self._per_channel(name))
        if np.min(self.std) <= 0:
            raise _wrong("std", "positive", self.std)

    def _per_channel(self, name: str) -> float | tuple[float, ...]:
        value = getattr(self, name)
        if not isinstance(value, list | tuple):
            return _number(name, value)
        if len(value) != self.channels:
            raise _wrong(name, f"one number or {self.channels} of them", value)
        return tuple(_number(name, item) for item in value)

    @property
    def channels(self) -> int:
        """Number of channels of a sample."""
        return 1 if self.color == "gray" else 3

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read a YAML file with attributes as keys; unknown keys are errors."""
        check_sizes([path], _MAX_YAML_BYTES)
        try:
            found = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
            raise DataError(f"{path}: is not YAML: {error}") from error
        known = [field.name for field in fields(cls)]
        if not isinstance(found, dict):
            raise DataError(f"{path}: must hold keys out of {', '.join(known)}")
        unknown = [reprlib.repr(key) for key in found if key not in known]
        if unknown:
            raise DataError(
                f"{path}: unknown keys {', '.join(unknown)}; known are {', '.join(known)}"
            )
        try:
            return cls(**found)
        except DataError as error:
            raise DataError(f"{path}: {error}") from error


def _wrong(name: str, allowed: str, value: object) -> DataError:
    return DataError(f"preprocessing '{name}' must be {allowed}; got {reprlib.repr(value)}")


def _number(name: str, value: object) -> float:
    """A finite number; texts too, since YAML 1.1 reads `1/255` and `1e-3` as texts."""
    try:
        if isinstance(value, int | float | str) and not isinstance(value, bool):
            number = float(Fraction(value[:64] if isinstance(value, str) else value))
            if math.isfinite(number):
                return number
    except (ValueError, OverflowError, ZeroDivisionError):
        pass
    raise _wrong(name, "a finite number", value)


def _size(name: str, value: object) -> int | tuple[int, int] | None:
    if value is None:
        return None
    sides = value if isinstance(value, list | tuple) else (value,)
    if len(sides) not in (1, 2) or not all(type(side) is int and side > 0 for side in sides):
        raise _wrong(name, "a positive integer or [height, width]", value)
    return sides[0] if len(sides) == 1 else (sides[0], sides[1])


def read_images(files: list[Path], preprocess: Preprocess, *, max_bytes: int) -> Array:
    """Return the images as float32 of shape (n, c, h, w), or (n, h, w, c) in layout nhwc.

    Raises:
        DataError: Pillow is missing, an image is damaged or too large, or sizes differ.
    """
    check_sizes(files, max_bytes)
    samples: Array | None = None
    for position, file in enumerate(files):
        pixels = _read_pixels(file, preprocess, max_bytes)
        if samples is None:
            _check_total(file, len(files) * pixels.size * 4, max_bytes)
            samples = np.empty((len(files), *pixels.shape), np.float32)
        if pixels.shape != samples.shape[1:]:
            raise DataError(
                f"{file}: is {pixels.shape[0]}x{pixels.shape[1]} (height x width), the images "
                f"before it are {samples.shape[1]}x{samples.shape[2]}; set 'resize' or 'crop' "
                "in the preprocessing file"
            )
        values = pixels.astype(np.float32) * np.float32(preprocess.scale)
        mean = np.asarray(preprocess.mean, np.float32)
        samples[position] = (values - mean) / np.asarray(preprocess.std, np.float32)
    if samples is None:
        raise DataError("no images were given")
    return samples if preprocess.layout == "nhwc" else np.moveaxis(samples, -1, 1).copy()


def _read_pixels(file: Path, preprocess: Preprocess, max_bytes: int) -> NDArray[np.uint8]:
    """Decode, resize and crop one image: uint8 of shape (height, width, channels)."""
    try:
        from PIL import Image
    except ImportError as error:
        raise DataError("image folders need Pillow: pip install onnxcomp[images]") from error
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(file, formats=_PILLOW_FORMATS) as opened:
                image = opened.convert(_MODES[preprocess.color])
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise DataError(f"{file}: has too many pixels: {error}") from error
    except (OSError, ValueError, SyntaxError, EOFError) as error:
        raise DataError(f"{file}: cannot be decoded: {error}") from error
    if preprocess.resize is not None:
        width, height = _resized(image.size, preprocess.resize)
        _check_total(file, width * height * preprocess.channels * 4, max_bytes)
        image = image.resize((width, height), Image.Resampling.BILINEAR)
    pixels = np.asarray(image, np.uint8).reshape(image.height, image.width, -1)
    if preprocess.color == "bgr":
        pixels = pixels[:, :, ::-1]
    return pixels if preprocess.crop is None else _cropped(file, pixels, preprocess.crop)


def _resized(size: tuple[int, int], wanted: int | tuple[int, int]) -> tuple[int, int]:
    """(width, height) after resizing; an integer sets the shorter side."""
    if isinstance(wanted, tuple):
        return wanted[1], wanted[0]
    width, height = size
    if width <= height:
        return wanted, wanted * height // width
    return wanted * width // height, wanted


def _cropped(
    file: Path, pixels: NDArray[np.uint8], wanted: int | tuple[int, int]
) -> NDArray[np.uint8]:
    height, width = wanted if isinstance(wanted, tuple) else (wanted, wanted)
    if pixels.shape[0] < height or pixels.shape[1] < width:
        raise DataError(
            f"{file}: is {pixels.shape[0]}x{pixels.shape[1]} (height x width), smaller than "
            f"the crop {height}x{width}; set 'resize' in the preprocessing file"
        )
    top, left = round((pixels.shape[0] - height) / 2), round((pixels.shape[1] - width) / 2)
    return pixels[top : top + height, left : left + width]
