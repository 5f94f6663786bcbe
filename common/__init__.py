"""Shared leaf: errors, command lines, files, images, devices, the training loop. Knows neither model."""
