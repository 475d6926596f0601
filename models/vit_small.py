"""ViT for small data sets (Lee et al. 2021, "Vision Transformer for Small-Size Datasets").

Two things set it apart from a plain ViT. Shifted patch tokenization: a patch carries also the
patches of four copies of the image, each shifted by a pixel. Locality self-attention: a learned
temperature, and no token attends to itself. Parameter names and initialization are those of
`vit_for_small_dataset.ViT` in the package vit-pytorch, so weights can be exchanged.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.layer_groups import Stage, StagedModel

SHIFTS = (
    (1, -1, 0, 0),
    (-1, 1, 0, 0),
    (0, 0, 1, -1),
    (0, 0, -1, 1),
)  # F.pad: right, left, down, up


class Patches(nn.Module):
    """Cut images [b, c, h, w] into flat patches [b, patches, patch * patch * c]."""

    def __init__(self, patch: int):
        super().__init__()
        self.patch = patch

    def forward(self, images: Tensor) -> Tensor:
        grid = images.unflatten(3, (-1, self.patch)).unflatten(2, (-1, self.patch))
        return grid.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


class ShiftedPatchTokenization(nn.Module):
    """Tokens of an image stacked with its four shifted copies."""

    def __init__(self, channels: int, patch: int, dim: int):
        super().__init__()
        patch_dim = (1 + len(SHIFTS)) * channels * patch**2
        self.to_patch_tokens = nn.Sequential(
            Patches(patch), nn.LayerNorm(patch_dim), nn.Linear(patch_dim, dim)
        )

    def forward(self, images: Tensor) -> Tensor:
        shifted = [F.pad(images, shift) for shift in SHIFTS]
        return self.to_patch_tokens(torch.cat([images, *shifted], dim=1))


class LocalitySelfAttention(nn.Module):
    """Pre-norm self-attention with a learned temperature, where no token sees itself."""

    def __init__(self, tokens: int, dim: int, heads: int, dim_head: int, dropout: float):
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        self.temperature = nn.Parameter(torch.tensor(math.log(dim_head**-0.5)))  # log of the scale
        self.norm = nn.LayerNorm(dim)
        self.to_qkv = nn.Linear(dim, 3 * heads * dim_head, bias=False)
        self.to_out = nn.Sequential(nn.Linear(heads * dim_head, dim), nn.Dropout(dropout))
        others = ~torch.eye(tokens, dtype=torch.bool)
        self.register_buffer("others", others, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.to_qkv(self.norm(x)).unflatten(-1, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each [batch, heads, tokens, dim_head]
        out = F.scaled_dot_product_attention(
            q * self.temperature.exp(),
            k,
            v,
            attn_mask=self.others,
            dropout_p=self.dropout if self.training else 0.0,
            scale=1.0,
        )
        return self.to_out(out.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """Pre-norm MLP of one hidden layer."""

    def __init__(self, dim: int, mlp_dim: int, dropout: float):
        super().__init__()
        self.net = nn.Sequential(
            nn.LayerNorm(dim),
            nn.Linear(dim, mlp_dim),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(mlp_dim, dim),
            nn.Dropout(dropout),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class Block(nn.Sequential):
    """A chain of layers with a shortcut around each: attention, then MLP."""

    def forward(self, x: Tensor) -> Tensor:
        for layer in self:
            x = x + layer(x)
        return x


class ViTSmall(StagedModel):
    """Layer groups: embedding (patches, positions, class token), block0 ... block5, head."""

    channel_dim = -1

    def __init__(
        self,
        channels: int = 3,
        classes: int = 10,
        image_size: int = 32,
        patch: int = 2,
        dim: int = 512,
        depth: int = 6,
        heads: int = 8,
        dim_head: int = 64,
        mlp_dim: int = 512,
        dropout: float = 0.1,
    ):
        super().__init__()
        if image_size % patch:
            raise ValueError(
                f"vit_small: patch {patch} does not divide the image size {image_size}"
            )
        tokens = (image_size // patch) ** 2 + 1
        self.to_patch_embedding = ShiftedPatchTokenization(channels, patch, dim)
        self.pos_embedding = nn.Parameter(torch.randn(1, tokens, dim))
        self.cls_token = nn.Parameter(torch.randn(1, 1, dim))
        self.dropout = nn.Dropout(dropout)
        blocks = [
            Block(
                LocalitySelfAttention(tokens, dim, heads, dim_head, dropout),
                FeedForward(dim, mlp_dim, dropout),
            )
            for _ in range(depth)
        ]
        self.transformer = nn.ModuleDict({"layers": nn.ModuleList(blocks)})
        self.mlp_head = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, classes))

    def stages(self) -> list[Stage]:
        blocks = self.transformer["layers"]
        return [
            ("embedding", ("to_patch_embedding", "pos_embedding", "cls_token"), self.embed),
            *((f"block{i}", (f"transformer.layers.{i}",), block) for i, block in enumerate(blocks)),
            ("head", ("mlp_head",), self.classify),
        ]

    def dropout_sites(self, kind: str = "blocks") -> dict[str, int]:
        """Behind each block, on the features of its tokens."""
        dim = self.pos_embedding.shape[-1]
        return {f"transformer.layers.{i}": dim for i in range(len(self.transformer["layers"]))}

    def embed(self, images: Tensor) -> Tensor:
        patches = self.to_patch_embedding(images)
        class_token = self.cls_token.expand(len(images), -1, -1)
        return self.dropout(torch.cat([class_token, patches], dim=1) + self.pos_embedding)

    def classify(self, x: Tensor) -> Tensor:
        return self.mlp_head(x[:, 0])
