"""Samples for the models at hand: some to fit on, and new ones that come from other files.

Images are preprocessed as the manifest says. CIFAR-10 models are fitted on training images and
judged on test images; pictures are split by file, speech by time. There are no data sets for
the other models, so their samples are stand-ins: what `NOTES` calls approximate has the right
shape, range and statistics of a signal, but is not what the model was trained on.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from benchmarks import pictures, sound
from benchmarks.common import DIGITS, model_path
from benchmarks.pictures import Views

Array = npt.NDArray[Any]
Arrays = Mapping[str, Array]
Part = Literal["fit", "new"]
Maker = Callable[[Part, int, np.random.Generator], Arrays]

_MEAN = np.array((0.485, 0.456, 0.406))
_STD = np.array((0.229, 0.224, 0.225))

LABELS = "labels"

NOTES: Mapping[str, str] = {
    "libonnx_mnist_8": "approximate: 8 x 8 digits of scikit-learn, enlarged",
    "apne_gtcrn_simple": "approximate: telephone speech, resampled to 16 kHz",
    "silero_vad_16k_op15": "approximate: telephone speech, resampled to 16 kHz",
    "microsoft_dnsmos_model_v8": "approximate: log-mel frames of resampled telephone speech",
    "mlperftiny_ad01_autoencoder": "approximate: log-mel frames of speech, not of machines",
    "mlperftiny_kws_dscnn": "approximate: MFCC of running speech, not of keywords",
    "mlperftiny_streaming_wakeword": "approximate: log-mel frames of running speech",
    "ipne_TBEFN_180x320": "approximate: darkened daylight pictures",
    "qonnx_espcn_subpixel_float": "4 x 4 patches of pictures",
}


def samples(
    model: str,
    part: Part,
    *,
    seed: int = 0,
    limit: int | None = None,
    count: int | None = None,
    labels: bool = False,
) -> Arrays:
    """Return samples of a model by input name, and "labels" where there are any.

    Args:
        model: Its name in the manifest, or that of the bundled one.
        part: "fit", or "new": from files, or a stretch of speech, that "fit" never sees.
        seed: Seed of what is drawn.
        limit: At most so many samples.
        count: So many samples instead of the usual number, or all that there are.
        labels: Labels of the samples to fit on, too; those of new ones are always given.
    """
    count = min(count or usual_count(model, part), limit or _WHOLE)
    rng = np.random.default_rng([seed, zlib.crc32(f"{model}:{part}".encode())])
    found = _MAKERS[model][0](part, count, rng)
    if part == "fit" and not labels:
        return {name: array for name, array in found.items() if name != LABELS}
    return found


def write_part(
    *,
    model: str,
    part: Part,
    file: str,
    seed: int = 0,
    limit: int | None = None,
    count: int | None = None,
    labels: bool = False,
) -> int:
    """Write samples as `samples` makes them to an `.npz` file; return how many there are."""
    found = samples(model, part, seed=seed, limit=limit, count=count, labels=labels)
    np.savez(file, allow_pickle=False, **found)
    return len(next(iter(found.values())))


def ensure_part(
    model: str, part: Part, file: str | Path, count: int | None = None, seed: int = 0
) -> None:
    """Write samples to a file that is not there yet; arguments as of `write_part`."""
    if not Path(file).exists():
        write_part(model=model, part=part, file=str(file), count=count, seed=seed)


def write(
    *, model: str, folder: str, seed: int = 0, limit: int | None = None
) -> dict[str, int]:
    """Write `MODEL.fit.npz` and `MODEL.new.npz`; return how many samples each has."""
    parts: Sequence[Part] = ("fit", "new")
    files = {part: str(sample_file(folder, model, part)) for part in parts}
    return {
        part: write_part(model=model, part=part, file=file, seed=seed, limit=limit)
        for part, file in files.items()
    }


def sample_file(folder: str | Path, model: str, part: Part) -> Path:
    """Return where `write` puts the samples."""
    return Path(folder) / f"{model}.{part}.npz"


def usual_count(model: str, part: Part) -> int:
    """Return how many samples `samples` gives where it is not told."""
    _, fit, new = _MAKERS[model]
    return {"fit": fit, "new": new}[part]


def names() -> list[str]:
    """Return the names of all models that there are samples for, the bundled one included."""
    return sorted(_MAKERS)


def _cifar(
    part: Part, count: int, rng: np.random.Generator, *, name: str, raw: bool = False
) -> Arrays:
    """Training images drawn at random, or the first test images with their labels."""
    images, labels = pictures.cifar10("train" if part == "fit" else "test")
    chosen = rng.permutation(len(images))[:count] if part == "fit" else np.arange(count)
    chosen = np.sort(chosen[chosen < len(images)])
    x = images[chosen].astype(np.float32)
    if not raw:
        x = ((x / 255 - _MEAN) / _STD).astype(np.float32)
        x = np.ascontiguousarray(x.transpose(0, 3, 1, 2))
    return {name: x, LABELS: labels[chosen].astype(np.int64)}


def _digits(part: Part, count: int, rng: np.random.Generator) -> Arrays:
    """Digits of scikit-learn, every second one to fit."""
    from sklearn.datasets import load_digits

    half = slice(0, None, 2) if part == "fit" else slice(1, None, 2)
    digits = load_digits()
    small, labels = digits.images[half], digits.target[half]
    chosen = rng.permutation(len(small))[:count]
    return {"Input3": pictures.enlarged_digits(small[chosen]), LABELS: labels[chosen]}


def _bundled(part: Part, count: int, rng: np.random.Generator) -> Arrays:
    """Training and test samples that lie beside the bundled model."""
    file = {"fit": "samples.npz", "new": "test.npz"}[part]
    with np.load(model_path(DIGITS).with_name(file)) as found:
        chosen = np.sort(rng.permutation(len(found[LABELS]))[:count])
        return {name: array[chosen] for name, array in found.items()}


_COCO = ("coco",)
_FACES = ("faces", "coco")
_WHOLE = 10**9

_MAKERS: Mapping[str, tuple[Maker, int, int]] = {
    DIGITS: (_bundled, 512, 1000),
    "akamaster_cifar10_resnet20": (partial(_cifar, name="input"), 512, 5000),
    "akamaster_cifar10_resnet56": (partial(_cifar, name="input"), 512, 5000),
    "mlperftiny_cifar10_resnet8": (partial(_cifar, name="input", raw=True), 512, 5000),
    "libonnx_mnist_8": (_digits, 512, 512),
    "oarriaga_emotion_mini_XCEPTION": (pictures.face_crops, 256, 128),
    "ipne_deeplab_v3_mnv2": (
        Views("sub_7", _COCO, (257, 257), mean=(127.5,), scale=127.5, nhwc=True),
        24,
        12,
    ),
    "ipne_TBEFN_180x320": (
        Views("Placeholder", _COCO, (180, 320), scale=255, dark=True),
        16,
        12,
    ),
    "kazuhito00_yolox_nano": (
        Views("images", _COCO, (416, 416), bgr=True, letterbox=True),
        48,
        16,
    ),
    "libonnx_super_resolution_10": (
        Views("input", ("set12", "coco"), (224, 224), scale=255, grey=True),
        16,
        12,
    ),
    "qonnx_espcn_subpixel_float": (
        Views("input", ("coco", "set12"), (4, 4), scale=255, patch=True),
        512,
        256,
    ),
    "linzaer_ultralight_face_RFB-320": (
        Views("input", _FACES, (240, 320), mean=(127,), scale=128),
        128,
        32,
    ),
    "linzaer_ultralight_face_slim-320_nopost": (
        Views("input", _FACES, (240, 320), mean=(127,), scale=128),
        128,
        32,
    ),
    "shiqiyu_scrfd_500m_bnkps": (
        Views("input.1", _FACES, (256, 320), mean=(127.5,), scale=128, bgr=True),
        128,
        32,
    ),
    "shiqiyu_retinaface_mbnet0.25": (
        Views("input", _FACES, (256, 320), mean=(104, 117, 123), bgr=True),
        128,
        32,
    ),
    "shiqiyu_yunet_n_dynamic": (Views("input", _FACES, (256, 320), bgr=True), 128, 32),
    "ipne_yunet_120x160": (Views("input", _FACES, (120, 160), bgr=True), 128, 32),
    "microsoft_dnsmos_model_v8": (sound.dnsmos, 64, 32),
    "mlperftiny_ad01_autoencoder": (sound.anomaly, 512, 256),
    "mlperftiny_kws_dscnn": (sound.keywords, 256, 128),
    "mlperftiny_streaming_wakeword": (sound.wakeword, 256, 128),
    "apne_gtcrn_simple": (sound.gtcrn, 192, 96),
    "silero_vad_16k_op15": (sound.silero, 192, 96),
}
"""How the samples of each model are made, and how many there are to fit and how many new."""
