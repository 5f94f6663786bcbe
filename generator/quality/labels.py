"""What a number may be called: never more than was measured."""

from generator.quality.config import FULL
from generator.quality.reference import About


def _because(is_inception: bool, num_samples: int, reference: About) -> list[str]:
    """Why a distance is not plainly FID."""
    reasons = [] if is_inception else ["demo features"]
    reasons += [f"N = {num_samples:,}"] if num_samples < FULL else []
    reasons += ["reference decoded by the tokenizer"] if reference.decoded else []
    reasons += ["reference drawn by a model"] if reference.drawn_by is not None else []
    return reasons


def distance_field(is_inception: bool, num_samples: int, reference: About) -> str:
    """A distance's name in results.json: "fid" where it is plainly that, else "frechet_distance".

    Plainly: Inception looked, at 50,000 samples or more, and at a reference that no model has made or been over.
    """
    return "frechet_distance" if _because(is_inception, num_samples, reference) else "fid"


def measure_labels(is_inception: bool, num_samples: int, reference: About) -> dict[str, str]:
    """What reports print above the figures of each measure, by its name in results.json."""
    reasons = _because(is_inception, num_samples, reference)
    apart = f" ({', '.join(reasons)})" if reasons else ""
    seen = "Inception, " if is_inception and reasons else ""
    return {
        distance_field(is_inception, num_samples, reference): (
            f"Fréchet distance ({seen}{', '.join(reasons)})" if reasons else "FID"
        ),
        "inception_score": f"Inception score{apart}" if is_inception else f"classifier score{apart}",
        "kid": f"KID{apart}" if is_inception else f"kernel distance{apart}",
        "precision": f"precision{apart}",
        "recall": f"recall{apart}",
    }
