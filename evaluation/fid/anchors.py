"""What the same measures say of real pictures: how good a model could be, and how bad one without classes is."""

from typing import Any

import torch
from torch import Tensor

from common.images import to_float
from common.randomness import generator_for
from evaluation.fid.samples import Eyes
from evaluation.frechet import RunningStatistics, frechet_distance
from generator.pipeline import ChannelTokPipeline


class Anchors:
    """Looks at the reference's pictures as they are read.

    Args:
        pipeline: whose tokenizer rebuilds them from k tokens.
        eyes: what looks.
        budgets: each k.
        labels: the class of each picture, in the model's order; None where the folder does not tell them.
        seed: of the shuffling.
    """

    def __init__(
        self, pipeline: ChannelTokPipeline, eyes: Eyes, budgets: list[int], labels: list[int] | None, seed: int
    ):
        self.pipeline, self.eyes, self.budgets, self.seed = pipeline, eyes, budgets, seed
        self.labels = None if labels is None or eyes.classifier is None else torch.tensor(labels)
        # float64, which MPS does not know
        device = torch.device("cpu") if eyes.extractor.device.type == "mps" else eyes.extractor.device
        self._halves = [RunningStatistics(eyes.extractor.dimensions, device) for _ in range(2)]
        self._whole = RunningStatistics(eyes.extractor.dimensions, device)
        self._rebuilt = {k: RunningStatistics(eyes.extractor.dimensions, device) for k in budgets}
        self._shown: list[Tensor] = []
        self._predicted: dict[int, list[Tensor]] = {k: [] for k in [0, *budgets]}  # 0: the pictures as they are

    @torch.no_grad()
    def look(self, places: list[int], pictures: Tensor) -> None:
        """Take in pictures (b 3 H W) uint8 and their places in the reference."""
        features = self._note(0, pictures)
        self._whole.update(features)
        rows = torch.tensor(places)
        for parity, half in enumerate(self._halves):  # files are sorted by class: every second one is of all classes
            half.update(features[rows % 2 == parity])
        self._shown.append(rows)
        tokenizer = self.pipeline.tokenizer
        tokens = tokenizer.tokenize(to_float(pictures).to(tokenizer.device))
        for k in self.budgets:
            self._rebuilt[k].update(self._note(k, self.pipeline.pictures(tokens[:, :k])))

    def _note(self, k: int, pictures: Tensor) -> Tensor:
        features, _, predicted = self.eyes.look(pictures)
        if predicted is not None:
            self._predicted[k].append(predicted)
        return features

    def summary(self) -> dict[str, Any]:
        """What was found, JSON values; an accuracy is null where classes are not known.

        images: how many pictures. real: `distance` of one half of them to the other, `images` in either half,
        `class_accuracy`. shuffled: the accuracy with the same classes in a random order. reconstructions: for each k
        `num_tokens`, `distance` to the same pictures as they were, `class_accuracy`.
        """
        places = torch.cat(self._shown)
        labels = None if self.labels is None else self.labels[places]

        def accuracy(k: int, truth: Tensor | None) -> float | None:
            return None if truth is None else float((torch.cat(self._predicted[k]) == truth).double().mean())

        order = torch.randperm(len(places), generator=generator_for(self.seed, 5))
        shuffled = None if labels is None else labels[order]
        return {
            "images": len(places),
            "real": {
                "distance": frechet_distance(*self._halves),
                "images": [half.count for half in self._halves],
                "class_accuracy": accuracy(0, labels),
            },
            "shuffled": {"class_accuracy": accuracy(0, shuffled)},
            "reconstructions": [
                {
                    "num_tokens": k,
                    "distance": frechet_distance(self._rebuilt[k], self._whole),
                    "class_accuracy": accuracy(k, labels),
                }
                for k in self.budgets
            ],
        }
