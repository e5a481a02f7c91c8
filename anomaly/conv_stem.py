"""Patches of a vision transformer made by a few small convolutions in place of one large one.

Source: Xiao et al., Early convolutions help transformers see better, NeurIPS 2021, arXiv:2106.14881.
Departs from it: group norms in place of batch norms, so an image's features do not depend on the batch.
"""
from __future__ import annotations

from timm.layers import PatchEmbed
from torch import Tensor, nn

from data.errors import expect

WIDTHS = (32, 64)
GROUP = 8  # channels that are brought to one mean and deviation together


class ConvStem(PatchEmbed):
    """As timm's PatchEmbed, for patches whose sides four divides."""

    def __init__(self, *args: object, in_chans: int = 3, embed_dim: int = 192, **options: object) -> None:
        super().__init__(*args, in_chans=in_chans, embed_dim=embed_dim, **options)
        sides = tuple(self.patch_size)
        expect(all(side % 4 == 0 for side in sides), "patch_size", "multiples of 4 pixels", sides)
        expect(embed_dim % GROUP == 0, "embed_dim", f"a multiple of {GROUP}", embed_dim)
        self.proj = _Convolutions(in_chans, embed_dim, tuple(side // 4 for side in sides))


class _Convolutions(nn.Module):
    """(N, C, H, W) to (N, D, rows, columns): halved twice, looked at once more, then one step a patch."""

    def __init__(self, channels: int, width: int, patch: tuple[int, int]) -> None:
        super().__init__()
        first, second = WIDTHS
        self.halved = nn.Sequential(*_convolved(channels, first, 3, stride=2, padding=1), nn.GELU(),
                                    *_convolved(first, second, 3, stride=2, padding=1), nn.GELU())
        self.again = nn.Sequential(*_convolved(second, second, 3, padding=1), nn.GELU(),
                                   *_convolved(second, second, 3, padding=1))
        self.patches = nn.Sequential(nn.GELU(), *_convolved(second, width, patch, stride=patch), nn.GELU(),
                                     nn.Conv2d(width, width, 1))

    def forward(self, images: Tensor) -> Tensor:
        small = self.halved(images)
        return self.patches(small + self.again(small))


def _convolved(channels: int, width: int, kernel: int | tuple[int, int], **options: object) -> tuple[nn.Module, ...]:
    return nn.Conv2d(channels, width, kernel, **options), nn.GroupNorm(width // GROUP, width)
