"""Flags of demo.py; imports no torch."""

from dataclasses import dataclass

from common.config import Config, Dtype, setting
from generator.config import DEMO_MODEL


@dataclass(frozen=True, kw_only=True)
class PageConfig(Config):
    """Flags of demo.py."""

    model: str = setting(DEMO_MODEL, "folder with tokenizer/ and generator/, or a hub name")
    host: str = setting("127.0.0.1", "address to listen on; 0.0.0.0: all, for visitors from other machines")
    port: int = setting(7860, "port to listen on", ge=1, le=65535)
    device: str = setting("auto", "auto, cpu, cuda, cuda:1 or mps")
    dtype: Dtype = setting("float32", "number format of the generator's weights")
    compile: bool = setting(False, "compile the step first (a minute)")
    concurrency: int = setting(2, "images drawn at the same time; other requests wait in the queue", ge=1, le=64)
    queue_size: int = setting(100, "requests that may wait; further ones are refused", ge=1)


@dataclass(frozen=True, kw_only=True)
class Choice(Config):
    """Settings of one image, checked on the server."""

    class_label: int = setting(ge=0)
    seed: int = setting(ge=0, le=2**53 - 16)
    cfg_scale: float = setting(ge=0, le=20)
    temperature: float = setting(ge=0, le=4)
    refine: bool = False
