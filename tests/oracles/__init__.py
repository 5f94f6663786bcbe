"""Slow, plain versions of what the product computes cleverly."""
