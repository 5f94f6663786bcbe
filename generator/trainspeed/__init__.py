"""How many tokens a second a generator trains on: ways of one step, interleaved, against the arithmetic."""

from generator.trainspeed.config import Subject, TrainSpeedConfig
from generator.trainspeed.measure import measure_training
from generator.trainspeed.report import write_report

__all__ = ["Subject", "TrainSpeedConfig", "measure_training", "write_report"]
