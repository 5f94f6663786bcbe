"""Quality of reconstructions from k tokens: PSNR, SSIM, LPIPS, rFID, codebook use and rate."""
