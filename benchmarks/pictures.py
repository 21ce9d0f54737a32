"""Views of the shared pictures, split by file: crops, letterboxes, patches, faces."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

from benchmarks.common import model_path, shared_folder

Array = npt.NDArray[Any]
Part = Literal["fit", "new"]
_BILINEAR = Image.Resampling.BILINEAR
_BICUBIC = Image.Resampling.BICUBIC
_GREY = 114  # of a letterbox


def cifar10(split: str) -> tuple[Array, Array]:
    """Return images (n, 32, 32, 3) uint8 and labels (n,) of CIFAR-10."""
    path = shared_folder() / "data" / "cifar10.py"
    spec = importlib.util.spec_from_file_location("cifar10", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    images, labels = module.load(split)
    return images, labels


def files(kinds: Sequence[str], part: Part) -> list[Image.Image]:
    """Return every second picture of each kind: the even ones to fit, the odd ones as new."""
    found = []
    for kind in kinds:
        paths = sorted((shared_folder() / "data" / "images" / kind).iterdir())
        found += paths[0 if part == "fit" else 1 :: 2]
    return [Image.open(path).convert("RGB") for path in found]


@dataclass(frozen=True)
class Views:
    """Random views of pictures as (value - mean) / scale, in turn from each file.

    Attributes:
        name: Name of the input.
        kinds: Folders of pictures.
        size: Height and width of a view.
        mean: Subtracted, in 0..255; one value or one per channel.
        scale: Divided by.
        bgr: Channels in the order blue, green, red.
        grey: One channel, the luma.
        nhwc: Channels last.
        letterbox: Keep the aspect ratio and fill with grey at the right and the bottom.
        patch: Cut `size` out at full resolution instead of resizing a crop.
        dark: Darken as at night: a power of 2 to 3, and noise.
    """

    name: str
    kinds: tuple[str, ...]
    size: tuple[int, int]
    mean: tuple[float, ...] = (0.0,)
    scale: float = 1.0
    bgr: bool = False
    grey: bool = False
    nhwc: bool = False
    letterbox: bool = False
    patch: bool = False
    dark: bool = False

    def __call__(
        self, part: Part, count: int, rng: np.random.Generator
    ) -> Mapping[str, Array]:
        """Return `count` views by the name of the input."""
        pictures = files(self.kinds, part)
        made = []
        for index in range(count):
            view = self._view(pictures[index % len(pictures)], rng)
            x = np.asarray(view.convert("L") if self.grey else view, np.float32)
            x = x[..., None] if self.grey else x
            x = _darkened(x, rng) if self.dark else x
            x = x[..., ::-1] if self.bgr else x
            made.append((x - np.asarray(self.mean, np.float32)) / self.scale)
        array = np.stack(made).astype(np.float32)
        return {
            self.name: np.ascontiguousarray(
                array if self.nhwc else array.transpose(0, 3, 1, 2)
            )
        }

    def _view(self, picture: Image.Image, rng: np.random.Generator) -> Image.Image:
        height, width = self.size
        share = rng.uniform(0.5, 1.0)
        if self.patch:
            crop_width, crop_height = width, height
        elif self.letterbox:
            crop_width, crop_height = (round(share * side) for side in picture.size)
        else:  # the largest crop of the wanted shape, and of it a share
            largest = share * min(picture.width / width, picture.height / height)
            crop_width, crop_height = (max(round(largest * s), 1) for s in (width, height))
        left = int(rng.integers(picture.width - crop_width + 1))
        top = int(rng.integers(picture.height - crop_height + 1))
        view = picture.crop((left, top, left + crop_width, top + crop_height))
        view = ImageOps.mirror(view) if rng.random() < 0.5 else view
        if not self.letterbox:
            return view.resize((width, height), _BILINEAR)
        shrink = min(width / crop_width, height / crop_height)
        inner = view.resize(
            (round(crop_width * shrink), round(crop_height * shrink)), _BILINEAR
        )
        canvas = Image.new("RGB", (width, height), (_GREY,) * 3)
        canvas.paste(inner, (0, 0))
        return canvas


def enlarged_digits(images: Array) -> Array:
    """Return 8 x 8 digits of 0..16 as (n, 1, 28, 28) of 0..255: 20 x 20 within a margin."""
    made = np.zeros((len(images), 1, 28, 28), np.float32)
    for target, digit in zip(made, images, strict=True):
        small = Image.fromarray((digit * (255 / 16)).astype(np.uint8))
        target[0, 4:24, 4:24] = np.asarray(small.resize((20, 20), _BICUBIC))
    return made


def face_crops(part: Part, count: int, rng: np.random.Generator) -> Mapping[str, Array]:
    """Return grey faces (n, 64, 64, 1) that the RFB-320 detector finds, as x / 127.5 - 1."""
    crops = []
    for picture in files(("faces",), part):
        crops += [(picture, box) for box in _faces(picture)]
    made = []
    for index in rng.integers(len(crops), size=count):
        picture, box = crops[index]
        face = picture.convert("L").crop(box).resize((64, 64), _BILINEAR)
        face = ImageOps.mirror(face) if rng.random() < 0.5 else face
        made.append(np.asarray(face, np.float32)[..., None] / 127.5 - 1)
    return {"input": np.stack(made)}


def _darkened(x: Array, rng: np.random.Generator) -> Array:
    dark = 255 * rng.uniform(0.2, 0.5) * (x / 255) ** rng.uniform(2, 3)
    noisy = dark + rng.normal(0, 2, x.shape)
    return np.asarray(np.clip(noisy, 0, 255), np.float32)


def _faces(picture: Image.Image) -> list[tuple[int, int, int, int]]:
    """Return square boxes around faces, overlapping ones included."""
    from onnxcomp import load
    from onnxcomp.runtime import Session

    session = Session(load(model_path("linzaer_ultralight_face_RFB-320")))
    x = np.asarray(picture.resize((320, 240), _BILINEAR), np.float32)
    found = session.run({"input": ((x - 127) / 128).transpose(2, 0, 1)[None]})
    sure = found["scores"][0, :, 1] > 0.7
    corners = found["boxes"][0][sure] * np.tile(picture.size, 2)
    boxes = []
    for left, top, right, bottom in corners:
        half = max(right - left, bottom - top) * 0.55
        x0, y0 = (left + right) / 2, (top + bottom) / 2
        boxes.append((int(x0 - half), int(y0 - half), int(x0 + half), int(y0 + half)))
    return [box for box in boxes if box[2] - box[0] >= 16]
