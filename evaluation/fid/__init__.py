"""Quality of samples of k tokens: Fréchet distance, KID, score, precision, recall and class accuracy, in one pass."""
