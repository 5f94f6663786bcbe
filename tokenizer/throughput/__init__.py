"""How many images a second a tokenizer encodes and decodes: variants, interleaved, against a plain matrix product."""

from tokenizer.throughput.config import VARIANTS, ThroughputConfig
from tokenizer.throughput.measure import measure_throughput
from tokenizer.throughput.report import write_report

__all__ = ["VARIANTS", "ThroughputConfig", "measure_throughput", "write_report"]
