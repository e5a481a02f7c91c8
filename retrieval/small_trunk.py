"""A small convolutional image trunk, known to timm by name so that open_clip builds it like any other.

Mean pooling follows the last convolution directly: the feature of a scene is a mean over places, so that, up to
overlaps, an object adds the same amount wherever it stands. That is what embedding arithmetic asks for.
"""
from __future__ import annotations

from timm.models import register_model
from torch import Tensor, nn

NAME = "small_trunk"                                                  # for open_clip's `timm_model_name`
LAYERS = ((24, 2), (48, 2), (64, 1), (128, 2), (160, 1))  # channels, stride; each sees 3 x 3


class SmallTrunk(nn.Module):
    """(B, 3, H, W) -> (B, 160): convolution, batch norm, ReLU five times, then the mean over places."""

    def __init__(self) -> None:
        super().__init__()
        channels = 3
        self.layers = nn.Sequential()
        for width, stride in LAYERS:
            self.layers.append(nn.Sequential(nn.Conv2d(channels, width, 3, stride, 1, bias=False),
                                             nn.BatchNorm2d(width), nn.ReLU(inplace=True)))
            channels = width
        self.num_features = channels
        self.default_cfg = {"pool_size": (8, 8)}  # open_clip reads it

    def reset_classifier(self, num_classes: int, global_pool: str = "avg") -> None:
        """Part of timm's interface; there is no classifier, and the pool is always the mean."""

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images).mean((-2, -1))


@register_model
def small_trunk(pretrained: bool = False, **_: object) -> SmallTrunk:
    """The entry timm calls; it adds settings of its own (tags, caches) that mean nothing here."""
    return SmallTrunk()
