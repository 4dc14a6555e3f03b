"""Five small classifiers as people write them, for ``outside_models.py``. Their habits break exporters.

Every function builds a model of 10 classes for images of 64 pixels with weights of a fixed seed.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm

SIZE = 64
"""Height and width of the input, pixels."""
CLASSES = 10
"""Number of classes."""
WIDTH = 48
"""Number of channels after the stem."""
TRAINING_BATCHES = 4
"""Number of batches from which the batch norms get their statistics."""


class Base(nn.Module):
    """Convs that leave a map of 8 x 8, what a subclass does with it, and a linear classifier."""

    img_size = SIZE

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, WIDTH, 3, 4, 1, bias=False),
            nn.BatchNorm2d(WIDTH),
            nn.GELU(),
            nn.Conv2d(WIDTH, WIDTH, 3, 2, 1, groups=WIDTH, bias=False),
            nn.BatchNorm2d(WIDTH),
        )
        self.head = nn.Linear(WIDTH, CLASSES)

    def body(self, x: Tensor) -> Tensor:
        """``(N, C, 8, 8)`` -> the same."""
        return x

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.stem(x)).mean((2, 3)))


class Encoder(Base):
    """``nn.TransformerEncoderLayer``, whose eval mode takes a fused kernel of PyTorch's own."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(
            WIDTH, 4, 2 * WIDTH, activation="gelu", batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.position = nn.Parameter(0.1 * torch.randn(1, 64, WIDTH))

    def body(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2) + self.position
        return self.encoder(tokens).transpose(1, 2).reshape(x.shape)


class Shared(Base):
    """One block that is applied three times; ``einsum``, talking heads, a bias by relative position."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.talk = nn.Parameter(torch.eye(4) + 0.1 * torch.randn(4, 4))
        self.bias = nn.Parameter(0.1 * torch.randn(15 * 15, 4))
        grid = torch.stack(torch.meshgrid(torch.arange(8), torch.arange(8), indexing="ij")).flatten(1)
        offset = grid[:, :, None] - grid[:, None] + 7
        self.register_buffer("index", offset[0] * 15 + offset[1], persistent=False)

    def body(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2)
        for _ in range(3):
            tokens = tokens + self.attend(F.layer_norm(tokens, (WIDTH,)))
        return tokens.transpose(1, 2).unflatten(2, (8, 8))

    def attend(self, tokens: Tensor) -> Tensor:
        """``(N, L, C)`` -> the same."""
        q, k, v = self.qkv(tokens).unflatten(2, (3, 4, -1)).unbind(2)
        scores = torch.einsum("nihd,njhd->nhij", q, k) / q.shape[-1] ** 0.5
        scores = scores + self.bias[self.index].permute(2, 0, 1)
        scores = torch.einsum("hg,ngij->nhij", self.talk, scores.softmax(-1))
        return self.out(torch.einsum("nhij,njhd->nihd", scores, v).flatten(2))


class Coordinates(Base):
    """Weight norms, coordinates that are made from the shape of the map, a gate from ``chunk``, pixel
    unshuffling."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = weight_norm(nn.Conv2d(WIDTH + 2, 2 * WIDTH, 1))
        self.down = weight_norm(nn.Conv2d(4 * WIDTH, WIDTH, 1))

    def body(self, x: Tensor) -> Tensor:
        rows = torch.linspace(-1, 1, x.shape[2], device=x.device)
        columns = torch.linspace(-1, 1, x.shape[3], device=x.device)
        grid = torch.stack(torch.meshgrid(rows, columns, indexing="ij"))
        x = torch.cat([x, grid.expand(len(x), -1, -1, -1)], 1)
        value, gate = self.mix(x).chunk(2, 1)
        return self.down(F.pixel_unshuffle(value * gate.sigmoid(), 2))


class Transformer(Base):
    """A spatial transformer: the image decides where it is sampled (``affine_grid`` and ``grid_sample``)."""

    def __init__(self) -> None:
        super().__init__()
        self.where = nn.Linear(WIDTH, 6)
        nn.init.normal_(self.where.weight, std=0.05)
        with torch.no_grad():
            self.where.bias.copy_(torch.tensor([1.0, 0, 0, 0, 1, 0]))

    def body(self, x: Tensor) -> Tensor:
        theta = self.where(x.mean((2, 3))).view(-1, 2, 3)
        grid = F.affine_grid(theta, list(x.shape), align_corners=False)
        return F.grid_sample(x, grid, mode="bilinear", padding_mode="border", align_corners=False)


class Neighbours(Base):
    """Attention over 3 x 3 neighbours by ``unfold``, channels-last norms, a response norm over the whole
    map, parts in a ``ModuleDict``."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleDict(
            {"norm": nn.LayerNorm(WIDTH), "qk": nn.Linear(WIDTH, 2 * WIDTH), "v": nn.Linear(WIDTH, WIDTH)}
        )
        self.scales = nn.ParameterList([torch.ones(WIDTH), torch.zeros(WIDTH)])

    def body(self, x: Tensor) -> Tensor:
        tokens = self.parts["norm"](x.permute(0, 2, 3, 1))
        q, k = self.parts["qk"](tokens).permute(0, 3, 1, 2).tensor_split(2, dim=1)
        v = self.parts["v"](tokens).permute(0, 3, 1, 2)
        near_k, near_v = (F.unfold(y, 3, padding=1).unflatten(1, (WIDTH, 9)) for y in (k, v))
        scores = (q.flatten(2).unsqueeze(2) * near_k).sum(1, keepdim=True) / WIDTH**0.5
        x = x + (scores.softmax(2) * near_v).sum(2).view_as(x)
        response = x.norm(dim=(2, 3), keepdim=True)
        response = response / (response.mean(1, keepdim=True) + 1e-6)
        gamma, beta = (scale.view(-1, 1, 1) for scale in self.scales)
        return gamma * x * response + beta + x


def build(kind: Callable[[], nn.Module]) -> nn.Module:
    """A model with weights of a fixed seed, whose batch norms have seen some images."""
    torch.manual_seed(0)
    model = kind().train()
    with torch.no_grad():
        for _ in range(TRAINING_BATCHES):
            model(torch.randn(16, 3, SIZE, SIZE))
    return model.eval()


def encoder() -> nn.Module:
    return build(Encoder)


def shared() -> nn.Module:
    return build(Shared)


def coordinates() -> nn.Module:
    return build(Coordinates)


def transformer() -> nn.Module:
    return build(Transformer)


def neighbours() -> nn.Module:
    return build(Neighbours)
