"""Building, saving and loading the generator: a plain `LlamaForCausalLM` and a card beside it."""

import copy
import json
from dataclasses import asdict
from pathlib import Path

import torch
from transformers import LlamaForCausalLM

from common.checkpoint import from_pretrained_strictly, read_json, resolve_folder, save_pretrained_whole, write_text
from common.errors import InputError
from common.runtime import move, pick_dtype
from generator.config import GeneratorConfig, TokenLayout, llama_config

CARD_FILE = "channeltok.json"


def build_generator(config: GeneratorConfig, layout: TokenLayout) -> LlamaForCausalLM:
    """A fresh model; its weights follow torch's global seed."""
    return LlamaForCausalLM(llama_config(config, layout))


def save_generator(model: LlamaForCausalLM, layout: TokenLayout, folder: str | Path, dtype: str = "float32") -> None:
    """Write config.json, channeltok.json and model.safetensors; each appears whole, the weights last."""
    write_text(Path(folder) / CARD_FILE, json.dumps(asdict(layout), indent=1))
    save_pretrained_whole(move(copy.deepcopy(model), dtype=pick_dtype(dtype)), folder)


def load_layout(folder: str | Path) -> TokenLayout:
    """Read what the vocabulary of a generator folder means."""
    path = Path(folder) / CARD_FILE
    return TokenLayout.from_json(read_json(path), str(path))


def load_generator(folder: str | Path, dtype: torch.dtype = torch.float32) -> tuple[LlamaForCausalLM, TokenLayout]:
    """Read a generator folder.

    Raises:
        InputError: a missing or damaged file, another architecture, or a card that does not fit the weights.
    """
    folder = resolve_folder(folder)
    layout = load_layout(folder)
    model = from_pretrained_strictly(LlamaForCausalLM.from_pretrained, LlamaForCausalLM, folder, dtype=dtype)
    if model.config.vocab_size != layout.vocab_size:
        raise InputError(
            f"{folder}: {CARD_FILE} describes {layout.vocab_size} rows, the weights have {model.config.vocab_size}; "
            "the folder mixes two models"
        )
    return model, layout
