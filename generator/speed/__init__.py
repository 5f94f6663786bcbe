"""How fast tokens and pictures are drawn: several samplers, interleaved, against what the memory could give."""

from generator.speed.config import SpeedConfig, Subject
from generator.speed.measure import measure_speed
from generator.speed.report import write_report

__all__ = ["SpeedConfig", "Subject", "measure_speed", "write_report"]
