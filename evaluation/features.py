"""Feature networks, and torch-fidelity's metrics of their features; the only module that imports torch-fidelity.

The network is InceptionV3 as FID was defined with it (layer 2048, TensorFlow 1's resizing), or a small classifier.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.checkpoint import as_torch_file, fingerprint, load_foreign_state
from common.config import InputError
from evaluation.frechet import RunningStatistics
from tokenizer.classifier import PictureClassifier

FEATURES = 2048  # dimensions of Inception's features
WEIGHTS_NAME = "weights-inception-2015-12-05-6726825d.pth"
WEIGHTS_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
INCEPTION, DEMO_FEATURES = "Inception", "demo features"  # names of the networks in reports
KID_SUBSET, KID_SUBSETS, NEIGHBOURS = 1000, 100, 3
EXACT_PAIRS = 10**6  # entries of a table of distances that take a second or two in the exact way


def _downloaded_weights() -> Path:
    """Find torch-fidelity's weights in torch's cache, or download them there and check them."""
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

    path = Path(torch.hub.get_dir()) / "checkpoints" / WEIGHTS_NAME
    if not path.is_file():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(URL_INCEPTION_V3, str(path), hash_prefix=WEIGHTS_SHA256)
        except (OSError, RuntimeError) as error:
            raise InputError(
                f"the Inception weights cannot be downloaded ({error}); give a copy of {path.name} with "
                "--inception-weights, or do without it (reconstruction: --inception none, fid: --features FILE)"
            ) from error
    return path


def _inception(weights: str | Path | None) -> tuple[Any, str]:
    """Load the network; its name is "Inception" only with the weights that FID was defined with."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    path = _downloaded_weights() if weights is None else Path(weights)
    # torch-fidelity unpickles any content, so it gets a temporary file of checked tensors
    with as_torch_file(load_foreign_state(path)) as checked:
        try:
            network = FeatureExtractorInceptionV3("inception", [str(FEATURES), "logits_unbiased"], str(checked))
        except RuntimeError as error:
            raise InputError(f"{path} holds no InceptionV3 of torch-fidelity; give {WEIGHTS_NAME}") from error
    with path.open("rb") as file:
        published = hashlib.file_digest(file, "sha256").hexdigest() == WEIGHTS_SHA256
    return network, INCEPTION if published else f"{INCEPTION} of other weights"


class FeatureExtractor:
    """A frozen network in float32 that maps images to features (`dimensions`) and logits (`class_names`, if any).

    Args:
        weights: torch-fidelity's `weights-inception-2015-12-05-6726825d.pth`, or the same as .safetensors; None takes
            torch's cached copy or downloads it.
        device: where to compute.
        classifier: a file of `benchmark.py features` that replaces Inception.

    Raises:
        InputError: weights that cannot be downloaded, or a file without them or with more than tensors.
    """

    def __init__(
        self,
        weights: str | Path | None = None,
        device: torch.device | str = "cpu",
        *,
        classifier: str | Path | None = None,
    ):
        self.is_inception = classifier is None
        network: Any
        if classifier is None:
            network, self.name = _inception(weights)
            self.dimensions, self.class_names = FEATURES, list[str]()
        else:
            network, self.name = PictureClassifier.load(classifier), DEMO_FEATURES
            self.dimensions, self.class_names = network.head.in_features, network.class_names
        self.fingerprint = fingerprint(network)
        self.device = torch.device(device)
        self._network = network.eval().requires_grad_(False).to(self.device)

    @torch.no_grad()
    def extract(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images (b 3 H W) uint8 of any size -> features (b d) and logits (b c), float32, on the extractor's device.

        Inception's logits have no bias, as its score requires.
        """
        images = images.to(self.device)
        # convolutions of a GPU use TF32 by default
        with torch.backends.cudnn.flags(enabled=torch.backends.cudnn.enabled, allow_tf32=False):
            if self.is_inception:
                features, logits = self._network(images)
            else:
                features = self._network.features(self._network.prepare(images))
                logits = self._network.head(features)
        return features, logits

    def __call__(self, images: Tensor) -> Tensor:
        """Images as in `extract` -> features."""
        return self.extract(images)[0]

    def statistics(self) -> RunningStatistics:
        """Create empty statistics of features."""
        return RunningStatistics(self.dimensions, self.device)

    def accuracy(self, logits: Tensor, names: Sequence[str]) -> float | None:
        """Share of logits (n c) that are highest for the class of that name; None if the network lacks a class."""
        if not set(names) <= set(self.class_names):
            return None
        best = logits.argmax(1).tolist()
        return sum(self.class_names[i] == name for i, name in zip(best, names, strict=True)) / len(names)


def sample_metrics(features: Tensor, logits: Tensor, reference: Tensor) -> dict[str, float]:
    """Compare features (n d) of samples with those of a reference (m d), in float64; n at least 10, m at least 4.

    Returns:
        inception_score: of the logits (n c), mean over 10 random splits (Salimans et al., arXiv 1606.03498).
        kid: mean over 100 random subsets of `kid_subset` vectors of the unbiased squared maximum mean discrepancy with
            kernel (x y / d + 1)^3 (Binkowski et al., arXiv 1801.01401); it may be negative.
        precision: share of samples inside the ball of a reference image, whose radius is the distance to its third
            neighbour in the reference (Kynkäänniemi et al., arXiv 1904.06991). recall: with the sets exchanged.
    """
    from torch_fidelity import metric_isc, metric_kid, metric_prc

    samples, reference = features.double(), reference.double().to(features.device)
    subset = min(KID_SUBSET, len(samples), len(reference))
    # torch.cdist computes tables of up to 25 x 25 by differences, so that copies are at distance 0, and larger ones by
    # a faster matrix product with rounding errors
    table = 25 if max(len(samples), len(reference)) ** 2 <= EXACT_PAIRS else 1000
    score = metric_isc.isc_features_to_metric(logits)
    kid = metric_kid.kid_features_to_metric(
        samples, reference, kid_subset_size=subset, kid_subsets=KID_SUBSETS, verbose=False
    )
    manifold = metric_prc.prc_features_to_metric(
        samples, reference, prc_neighborhood=NEIGHBOURS, prc_batch_size=table, save_cpu_ram=True, verbose=False
    )
    return {
        "inception_score": score[metric_isc.KEY_METRIC_ISC_MEAN],
        "kid": kid[metric_kid.KEY_METRIC_KID_MEAN],
        "kid_subset": subset,
        "precision": manifold[metric_prc.KEY_METRIC_PRECISION],
        "recall": manifold[metric_prc.KEY_METRIC_RECALL],
    }
