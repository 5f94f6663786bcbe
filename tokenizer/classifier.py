"""A small classifier of photographs, whose features are used where Inception's weights are not available.

A residual network (He et al., arXiv 1512.03385) with GroupNorm, so that its output for a picture depends on that
picture alone. `benchmark.py features` trains one.
"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Self

from torch import Tensor, nn
from torch.nn import functional as F

from common.checkpoint import load_tensors, load_tensors_metadata, save_tensors
from common.config import InputError
from common.images import to_float
from tokenizer.settings import CLASSIFIER_GROUPS, ClassifierConfig

KIND = "channeltok-classifier"


class _Block(nn.Module):
    """(b i h w) -> (b o h/stride w/stride), after an activation."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm1 = nn.GroupNorm(CLASSIFIER_GROUPS, outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm2 = nn.GroupNorm(CLASSIFIER_GROUPS, outputs)
        nn.init.zeros_(self.norm2.weight)  # a fresh block is close to the identity
        self.shortcut = nn.Conv2d(inputs, outputs, 1, bias=False) if inputs != outputs else nn.Identity()
        self.stride = stride

    def forward(self, maps: Tensor) -> Tensor:
        inner = self.norm2(self.conv2(F.silu(self.norm1(self.conv1(maps)))))
        # rounded up where a side is odd, as the convolution does
        beside = F.avg_pool2d(maps, self.stride, ceil_mode=True) if self.stride > 1 else maps
        return F.silu(inner + self.shortcut(beside))


class PictureClassifier(nn.Module):
    """Class logits and features of pictures; `class_names` has a name for each label, in order."""

    def __init__(self, config: ClassifierConfig, class_names: list[str]):
        super().__init__()
        self.config, self.class_names, widths = config, class_names, config.widths
        self.stem = nn.Conv2d(3, widths[0], 4, 2, 1)
        strides = [1] + [2] * (len(widths) - 1)
        self.blocks = nn.ModuleList(map(_Block, [widths[0], *widths[:-1]], widths, strides))
        self.head = nn.Linear(widths[-1], len(class_names))
        nn.init.zeros_(self.head.weight)

    def features(self, images: Tensor) -> Tensor:
        """Pictures (b 3 H W) in [-1, 1], H = W = classifier_size -> (b widths[-1]), means of the last block's maps."""
        maps: Tensor = self.stem(images)  # b c h w
        for block in self.blocks:
            maps = block(maps)
        return maps.mean((2, 3))

    def forward(self, images: Tensor) -> Tensor:
        """Pictures (b 3 H W) in [-1, 1] -> logits (b classes)."""
        logits: Tensor = self.head(self.features(images))
        return logits

    def prepare(self, images: Tensor) -> Tensor:
        """Pictures (b 3 H W) uint8 -> (b 3 s s) in [-1, 1], resized if necessary (bilinear, antialiased)."""
        size = (self.config.classifier_size, self.config.classifier_size)
        if images.shape[-2:] == size:
            return to_float(images)
        return F.interpolate(to_float(images), size, mode="bilinear", antialias=True, align_corners=False)

    def save(self, path: str | Path) -> None:
        """Write one safetensors file with weights in bfloat16, and the network and class names in its header."""
        # a single entry: safetensors writes several in another order each time
        about = {KIND: json.dumps({"config": asdict(self.config), "class_names": self.class_names})}
        save_tensors(path, {name: value.bfloat16() for name, value in self.state_dict().items()}, about)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what `save` wrote; frozen, in evaluation mode, float32.

        Raises:
            InputError: no such file, or not one that `save` wrote.
        """
        header = load_tensors_metadata(path)
        if KIND not in header:
            raise InputError(f"{path} holds no classifier; give a file that `benchmark.py features` wrote")
        try:
            about = json.loads(header[KIND])
            model = cls(ClassifierConfig(**about["config"]), about["class_names"])
            model.load_state_dict({k: v.float() for k, v in load_tensors(path).items()})
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise InputError(f"{path} is not a complete classifier ({error}); copy or train it again") from error
        return model.eval().requires_grad_(False)
