"""How pictures look to a network, and how alike two sets of them are; the one place that knows torch-fidelity.

The network is InceptionV3 as it was first published, layer 2048, pictures resized to 299 x 299 as TensorFlow 1 did it:
so figures can be compared with those of other work that uses it. Where its weights cannot be had, a small classifier
(`common.classifier`) takes its place, registered with torch-fidelity under the name `CLASSIFIER`.
"""

import functools
import hashlib
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.checkpoint import as_torch_file, fingerprint, load_foreign_state
from common.classifier import PictureClassifier
from common.errors import InputError

FEATURES = 2048  # numbers by which Inception stands for a picture
WEIGHTS_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
CLASSIFIER = "channeltok-classifier"
INCEPTION, DEMO_FEATURES = "Inception", "demo features"  # what reports call the networks
# what a set needs: InceptionV3's score has 10 splits, and a neighbourhood of precision and recall 3 others
NEIGHBOURS = 3
KID_SUBSET, KID_SUBSETS = 1000, 100
# rows and columns of a table of distances at a time. torch takes differences up to 25 and a matrix product beyond,
# whose rounding sets copies of a picture apart: a reach of 0, as copies have, then holds some of them and not others
EXACT_TABLE, FAST_TABLE = 25, 1000
EXACT_PAIRS = 10**6  # up to which the exact way takes a second or two


def _downloaded_weights() -> Path:
    """The file that torch-fidelity publishes, from torch's cache or downloaded into it and checked."""
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

    url = str(URL_INCEPTION_V3)
    path = Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[1]
    if path.is_file():
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(path), hash_prefix=WEIGHTS_SHA256)
    except (OSError, RuntimeError) as error:  # no network, or not the bytes that were published
        raise InputError(
            f"the Inception weights cannot be downloaded ({error}); give a copy of {path.name} with "
            "--inception-weights, or do without it (reconstruction: --inception none, fid: --features FILE)"
        ) from error
    return path


def _inception(weights: str | Path | None) -> tuple[Any, str]:
    """The network, and what to call it: Inception only with the very weights that FID was defined with."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    path = _downloaded_weights() if weights is None else Path(weights)
    # torch-fidelity unpickles whatever a file holds, so it only ever sees one that was made here, of tensors
    with as_torch_file(load_foreign_state(path)) as checked:
        try:
            network = FeatureExtractorInceptionV3("inception", [str(FEATURES), "logits_unbiased"], str(checked))
        except RuntimeError as error:
            raise InputError(
                f"{path} holds no InceptionV3 of torch-fidelity (its weights are missing, unknown or misshapen); "
                "give weights-inception-2015-12-05-6726825d.pth"
            ) from error
    with path.open("rb") as file:
        published = hashlib.file_digest(file, "sha256").hexdigest() == WEIGHTS_SHA256
    return network, INCEPTION if published else f"{INCEPTION} of other weights"


@functools.cache
def register_classifier() -> type:
    """Make `PictureClassifier` known to torch-fidelity as feature extractor `CLASSIFIER`; its weights are a path.

    Its features are "pooled", which distances compare, and "logits", for the score.
    """
    from torch_fidelity.feature_extractor_base import FeatureExtractorBase
    from torch_fidelity.registry import register_feature_extractor

    class ClassifierFeatures(FeatureExtractorBase):
        def __init__(
            self,
            name: str,
            features_list: list[str],
            feature_extractor_weights_path: str | None = None,
            **options: object,
        ):
            super().__init__(name, features_list)
            if feature_extractor_weights_path is None:
                raise InputError(f"{CLASSIFIER} comes with no weights; give feature_extractor_weights_path")
            self.classifier = PictureClassifier.load(feature_extractor_weights_path)

        @staticmethod
        def get_provided_features_list() -> tuple[str, ...]:
            return "pooled", "logits"

        @staticmethod
        def get_default_feature_layer_for_metric(metric: str) -> str:
            return "logits" if metric == "isc" else "pooled"

        @staticmethod
        def can_be_compiled() -> bool:
            return False

        def forward(self, images: Tensor) -> tuple[Tensor, ...]:
            pooled = self.classifier.features(self.classifier.prepare(images))
            found = {"pooled": pooled, "logits": self.classifier.head(pooled)}
            return tuple(found[name] for name in self.features_list)

    register_feature_extractor(CLASSIFIER, ClassifierFeatures)
    return ClassifierFeatures


def _in_float32(device: torch.device) -> AbstractContextManager[None]:
    """Convolutions of a GPU in full precision, which they are not by default: features are those of a CPU."""
    if device.type == "cuda":
        return torch.backends.cudnn.flags(enabled=torch.backends.cudnn.enabled, allow_tf32=False)
    return nullcontext()


class FeatureExtractor:
    """Pictures to the vectors whose distributions are compared; frozen, in float32.

    Attributes: `name` says which network, as reports print it, "Inception" only of the published file; `is_inception`;
    `dimensions` of a vector; `fingerprint` of the weights; `class_names` of the classifier, None of Inception.

    Args:
        weights: a file of torch-fidelity's InceptionV3 (`weights-inception-2015-12-05-6726825d.pth`, or the same
            as .safetensors); None takes torch's cached copy, or downloads it there.
        device: where to compute.
        classifier: in its place a file that `benchmark.py features` wrote.

    Raises:
        InputError: weights that cannot be had, or a file that does not hold them or holds more than tensors.
    """

    def __init__(
        self,
        weights: str | Path | None = None,
        device: torch.device | str = "cpu",
        *,
        classifier: str | Path | None = None,
    ):
        self.is_inception = classifier is None
        self.class_names: list[str] | None = None
        if classifier is None:
            network, self.name = _inception(weights)
            self.dimensions = FEATURES
        else:
            # takes seconds, and only this class needs it
            network = register_classifier()(CLASSIFIER, ["pooled", "logits"], str(classifier))
            self.name, self.dimensions = DEMO_FEATURES, network.classifier.head.in_features
            self.class_names = list(network.classifier.class_names)
        self.fingerprint = fingerprint(network)
        self.device = torch.device(device)
        self._network = network.eval().requires_grad_(False).to(self.device)

    @torch.no_grad()
    def see(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Pictures (b 3 H W) uint8 of any size -> features (b d) and logits (b c), float32, on the extractor's device.

        Logits are Inception's without bias, as its score is computed from.
        """
        with _in_float32(self.device):
            features, logits = self._network(images.to(self.device))
        return features, logits

    def __call__(self, images: Tensor) -> Tensor:
        """As `see`, the features alone."""
        return self.see(images)[0]


def score_of_logits(logits: Tensor) -> float:
    """Inception score (Salimans et al., arXiv 1606.03498) of logits (n c), n at least 10: mean of 10 random splits."""
    from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, isc_features_to_metric

    return float(isc_features_to_metric(logits)[KEY_METRIC_ISC_MEAN])


def kid_subset(samples: int, reference: int) -> int:
    """Vectors in each subset of the kernel distance: 1,000, or as many as both sets have."""
    return min(KID_SUBSET, samples, reference)


def kernel_distance(samples: Tensor, reference: Tensor) -> float:
    """KID (Binkowski et al., arXiv 1801.01401) of features (n d), (m d): mean over 100 random subsets of both.

    The squared maximum mean discrepancy with kernel (x y / d + 1)^3, unbiased, so that it may fall below 0; in float64.
    """
    from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, kid_features_to_metric

    found = kid_features_to_metric(
        samples.double(),
        reference.double(),
        kid_subset_size=kid_subset(len(samples), len(reference)),
        kid_subsets=KID_SUBSETS,
        verbose=False,
    )
    return float(found[KEY_METRIC_KID_MEAN])


def precision_and_recall(samples: Tensor, reference: Tensor) -> tuple[float, float]:
    """Improved precision and recall (Kynkäänniemi et al., arXiv 1904.06991) of features (n d), (m d); n, m above 3.

    Precision: the share of samples that lie within reach of some reference picture, its reach being the distance to its
    third neighbour among the reference; recall the same with the sets exchanged. In float64, on the features' device.
    """
    pairs = max(len(samples), len(reference)) ** 2
    from torch_fidelity.metric_prc import KEY_METRIC_PRECISION, KEY_METRIC_RECALL, prc_features_to_metric

    found = prc_features_to_metric(
        samples.double(),
        reference.double(),
        prc_neighborhood=NEIGHBOURS,
        prc_batch_size=EXACT_TABLE if pairs <= EXACT_PAIRS else FAST_TABLE,
        save_cpu_ram=True,
        verbose=False,
    )
    # shares that are given in float32, of sets that are known
    precision, recall = float(found[KEY_METRIC_PRECISION]), float(found[KEY_METRIC_RECALL])
    return round(precision * len(samples)) / len(samples), round(recall * len(reference)) / len(reference)
