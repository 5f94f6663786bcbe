"""Measurements behind benchmark.py: fid, reconstruction and speed, with their metrics, tables and plots."""
