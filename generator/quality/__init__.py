"""How good samples of k tokens are: Fréchet distance, KID, score, precision, recall and class accuracy, in one pass."""

from generator.quality.config import QualityConfig
from generator.quality.measure import measure_quality, open_subject
from generator.quality.report import write_report
from generator.quality.sweep import sweep_quality

__all__ = ["QualityConfig", "measure_quality", "open_subject", "sweep_quality", "write_report"]
