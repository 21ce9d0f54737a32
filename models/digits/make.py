"""Make the demo model: `python -m models.digits.make` (about ten seconds on one core).

A residual network with three blocks of two 3x3 convolutions and 64 channels, trained on 1,000
of the 1,797 digits that come with scikit-learn (8x8 pixels, UCI ML, CC BY 4.0). Writes next to
this file, or into the folder given:

* digits.onnx: opset 17, BatchNorm kept, dynamic batch, input [batch, 1, 8, 8] in [0, 1];
* samples.npz: 512 of the training images under the input's name, with `labels`;
* test.npz: the 797 images that were held out, likewise.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional

from models.architectures import BasicBlock, conv_bn
from models.builders import INPUT, export_module

SEED = 0
TRAIN, SAMPLES = 1000, 512
EPOCHS, BATCH, LEARNING_RATE = 16, 50, 0.05
REQUIRED_ACCURACY = 0.98

Images = NDArray[np.float32]
Labels = NDArray[np.int64]


class DigitsNet(nn.Module):
    """Stem, three residual blocks of 64 channels, pooling, classifier; 8x8 all the way."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(conv_bn(1, 64, 3), nn.ReLU())
        self.blocks = nn.Sequential(*(BasicBlock(64, 64, 1, "A") for _ in range(3)))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (n, 10) of images (n, 1, 8, 8)."""
        return self.fc(self.pool(self.blocks(self.stem(x))).flatten(1))


def split_digits() -> tuple[Images, Labels, Images, Labels]:
    """Return training images (1000, 1, 8, 8) in [0, 1] and labels, then those held out."""
    digits = load_digits()
    images = (digits.images[:, None] / 16).astype(np.float32)
    labels = digits.target.astype(np.int64)
    order = np.random.default_rng(SEED).permutation(len(images))
    train, test = order[:TRAIN], order[TRAIN:]
    return images[train], labels[train], images[test], labels[test]


def shift(images: Tensor) -> Tensor:
    """Move each image by up to one pixel in each direction, drawing from the global seed."""
    padded = functional.pad(images, (1, 1, 1, 1))
    down, right = torch.randint(0, 3, (2, len(images), 1, 1))
    rows = down + torch.arange(8)[None, :, None]
    columns = right + torch.arange(8)[None, None, :]
    return padded[torch.arange(len(images))[:, None, None], 0, rows, columns][:, None]


def train(images: Images, labels: Labels) -> DigitsNet:
    """Train with momentum, a one-cycle learning rate and shifted images; returns eval mode."""
    torch.manual_seed(SEED)
    model = DigitsNet().train()
    inputs, targets = torch.from_numpy(images), torch.from_numpy(labels)
    steps = EPOCHS * (TRAIN // BATCH)
    optimizer = torch.optim.SGD(
        model.parameters(), LEARNING_RATE, momentum=0.9, weight_decay=5e-4, nesterov=True
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2 * LEARNING_RATE, steps)
    for _ in range(EPOCHS):
        for index in torch.randperm(TRAIN).split(BATCH):
            loss = functional.cross_entropy(model(shift(inputs[index])), targets[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, images: Images, labels: Labels) -> float:
    """Return the share of images whose largest logit is at the label."""
    predicted = model(torch.from_numpy(images)).argmax(1).numpy()
    return float((predicted == labels).mean())


def main(arguments: Sequence[str]) -> int:
    """Train, check and write everything; exit code 1 if the accuracy is too low."""
    folder = Path(arguments[0]) if arguments else Path(__file__).parent
    torch.set_num_threads(1)  # the result depends on the number of threads
    images, labels, test_images, test_labels = split_digits()
    model = train(images, labels)
    on_train, on_test = (
        accuracy(model, images, labels),
        accuracy(model, test_images, test_labels),
    )
    count = sum(parameter.numel() for parameter in model.parameters())
    print(f"{count:,} parameters, accuracy: training {on_train:.4f}, test {on_test:.4f}")
    if on_test < REQUIRED_ACCURACY:
        print(f"test accuracy is below {REQUIRED_ACCURACY}: nothing was written")
        return 1
    export_module(model, images.shape[1:], folder / "digits.onnx", folded=False, opset=17)
    np.savez_compressed(
        folder / "samples.npz", **{INPUT: images[:SAMPLES]}, labels=labels[:SAMPLES]
    )
    np.savez_compressed(folder / "test.npz", **{INPUT: test_images}, labels=test_labels)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
