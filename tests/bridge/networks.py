"""Small networks with what current architectures are made of; images are (n, 3, 32, 32)."""

import torch
from torch import Tensor, nn
from torch.nn import functional


class Attention(nn.Module):
    """Self-attention with one projection for queries, keys and values."""

    def __init__(self, size: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(size, 3 * size)
        self.out = nn.Linear(size, size)

    def forward(self, x: Tensor) -> Tensor:
        count, length, size = x.shape
        parts = self.qkv(x).reshape(count, length, 3, self.heads, size // self.heads)
        q, k, v = parts.permute(2, 0, 3, 1, 4).unbind(0)
        y = functional.scaled_dot_product_attention(q, k, v)
        return self.out(y.transpose(1, 2).reshape(count, length, size))


class Encoder(nn.Module):
    """Attention and a perceptron, the latter with a scale per channel."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(size), nn.LayerNorm(size)
        self.attention = Attention(size, 2)
        self.mlp = nn.Sequential(nn.Linear(size, 48), nn.GELU(), nn.Linear(48, size))
        self.scale = nn.Parameter(torch.randn(size))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.scale * self.mlp(self.norm2(x))


class VisionTransformer(nn.Module):
    """Patches, a class token, positions, two encoders."""

    def __init__(self, size: int = 32) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, size, 8, 8)
        self.token = nn.Parameter(torch.randn(1, 1, size))
        self.positions = nn.Parameter(torch.randn(1, 17, size))
        self.encoders = nn.Sequential(Encoder(size), Encoder(size))
        self.norm, self.head = nn.LayerNorm(size), nn.Linear(size, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.positions
        return self.head(self.norm(self.encoders(x))[:, 0])


class WindowAttention(nn.Module):
    """Shifted windows with relative positions, as in Swin."""

    def __init__(self, size: int = 16, window: int = 4) -> None:
        super().__init__()
        self.window, self.patches = window, nn.Conv2d(3, size, 4, 4)
        self.norm, self.qkv = nn.LayerNorm(size), nn.Linear(size, 3 * size)
        self.bias = nn.Parameter(torch.randn(49, 2))
        self.places: Tensor
        self.register_buffer("places", torch.randint(0, 49, (256,)))
        self.head = nn.Linear(size, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.roll(self.norm(self.patches(x).permute(0, 2, 3, 1)), (-2, -2), (1, 2))
        (b, h, w, c), s = x.shape, self.window
        y = x.view(b, h // s, s, w // s, s, c).permute(0, 1, 3, 2, 4, 5).reshape(-1, s * s, c)
        q, k, v = self.qkv(y).reshape(-1, s * s, 3, 2, c // 2).permute(2, 0, 3, 1, 4).unbind(0)
        bias = self.bias[self.places].view(s * s, s * s, 2).permute(2, 0, 1)
        y = (0.3 * q @ k.transpose(-2, -1) + bias).softmax(-1) @ v
        y = y.transpose(1, 2).reshape(b, h // s, w // s, s, s, c)
        y = y.permute(0, 1, 3, 2, 4, 5).reshape(b, h, w, c)
        return self.head(torch.roll(y, (2, 2), (1, 2)).mean((1, 2)))


class ConvNext(nn.Module):
    """A depthwise block with channels last, and three more normalisations."""

    def __init__(self, size: int = 16) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, size, 4, 4)
        self.depthwise = nn.Conv2d(size, size, 7, padding=3, groups=size)
        self.norm, self.up = nn.LayerNorm(size), nn.Linear(size, 4 * size)
        self.down, self.scale = nn.Linear(4 * size, size), nn.Parameter(torch.randn(size))
        self.group, self.instance = nn.GroupNorm(4, size), nn.InstanceNorm2d(size, affine=True)
        self.head = nn.Linear(size, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        y = self.down(functional.gelu(self.up(y))) * self.scale
        x = self.instance(self.group(x + y.permute(0, 3, 1, 2)))
        return self.head(functional.relu(x).mean((-2, -1)))


class Mobile(nn.Module):
    """Activations, squeeze-and-excite, up-sampling in three ways, shuffles."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 16, 3, 2, 1),
            nn.BatchNorm2d(16),
            nn.Hardswish(),
            nn.Conv2d(16, 16, 3, 1, 1, groups=16),
            nn.SiLU(),
            nn.PReLU(16),
        )
        self.excite = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(16, 4, 1),
            nn.ELU(),
            nn.Conv2d(4, 16, 1),
            nn.Hardsigmoid(),
        )
        self.up, self.thin = nn.ConvTranspose2d(16, 8, 4, 2, 1), nn.Conv2d(16, 8, 1)
        self.head = nn.Linear(24 * 4, 10)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        y = y * self.excite(y)
        up, thin = self.up(y), self.thin(y)
        near = functional.interpolate(thin, scale_factor=2.0, mode="nearest")
        size = up.shape[-2:]
        fine = functional.interpolate(thin, size=size, mode="bilinear", align_corners=False)
        a, b = torch.cat([up, near, fine], 1).chunk(2, 1)
        z = torch.cat([functional.leaky_relu(a, 0.1), functional.elu(b)], 1)
        z = functional.pixel_unshuffle(functional.pixel_shuffle(z, 2), 2)
        z = functional.max_pool2d(z, 3, 2, 1, ceil_mode=True)
        z = functional.avg_pool2d(z, 8).clamp(-1, 1)
        return functional.log_softmax(self.head(z.flatten(1)), -1)


class SequenceFirst(nn.Module):
    """Torch's own encoder layer, which puts the sequence in front of the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 8, 8)
        self.layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, activation="gelu")
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        return self.head(self.layer(x).mean(1))


NETWORKS = {
    "vision_transformer": VisionTransformer,
    "window_attention": WindowAttention,
    "convnext": ConvNext,
    "mobile": Mobile,
    "sequence_first": SequenceFirst,
}
