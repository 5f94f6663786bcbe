"""What a number may be called: never more than was measured."""

from evaluation.features import INCEPTION
from evaluation.fid.config import FULL
from evaluation.fid.reference import About

FEW = 10_000  # pictures of a reference below which their number is said beside every figure


def _because(network: str, num_samples: int, reference: About) -> list[str]:
    """Why a distance is not plainly FID."""
    reasons = [] if network == INCEPTION else [network]
    reasons += [f"N = {num_samples:,}"] if num_samples < FULL else []
    reasons += [f"M = {reference.count:,}"] if reference.count is not None and reference.count < FEW else []
    reasons += ["reference decoded by the tokenizer"] if reference.decoded else []
    reasons += ["reference drawn by a model"] if reference.drawn_by is not None else []
    return reasons


def distance_field(network: str, num_samples: int, reference: About) -> str:
    """A distance's name in results.json: "fid" where it is plainly that, else "frechet_distance".

    Plainly: Inception looked, with the published weights, at 50,000 samples or more and at a reference of 10,000
    pictures or more that no model has made or been over.
    """
    return "frechet_distance" if _because(network, num_samples, reference) else "fid"


def measure_labels(network: str, num_samples: int, reference: About) -> dict[str, str]:
    """What reports print above the figures of each measure, by its name in results.json."""
    reasons = _because(network, num_samples, reference)
    apart = f" ({', '.join(reasons)})" if reasons else ""
    is_inception = network.startswith(INCEPTION)
    seen = f"{INCEPTION}, " if network == INCEPTION else ""
    return {
        distance_field(network, num_samples, reference): (
            f"Fréchet distance ({seen}{', '.join(reasons)})" if reasons else "FID"
        ),
        "inception_score": f"Inception score{apart}" if is_inception else f"classifier score{apart}",
        "kid": f"KID{apart}" if is_inception else f"kernel distance{apart}",
        "precision": f"precision{apart}",
        "recall": f"recall{apart}",
        "class_accuracy": f"class accuracy (N = {num_samples:,})",
    }


def against(reference: About) -> str:
    """What was compared with, in a line."""
    count = "an unknown number of images" if reference.count is None else f"{reference.count:,} images"
    notes = ["decoded by the tokenizer"] if reference.decoded else []
    notes += [f"drawn by {reference.drawn_by}"] if reference.drawn_by else []
    return f"{reference.name}, {count}" + (f", {', '.join(notes)}" if notes else "")
