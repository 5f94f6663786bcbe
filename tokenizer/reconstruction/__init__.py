"""How good reconstructions from k tokens are: PSNR, SSIM, LPIPS, rFID and codebook use, in one pass over the data."""

from tokenizer.reconstruction.config import ReconstructionConfig
from tokenizer.reconstruction.measure import measure_reconstruction
from tokenizer.reconstruction.report import read_curve, write_report

__all__ = ["ReconstructionConfig", "measure_reconstruction", "read_curve", "write_report"]
