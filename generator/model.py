"""Building, saving and loading the generator: a plain `LlamaForCausalLM` and a card beside it."""

import copy
import dataclasses
import json
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from common.checkpoint import from_pretrained_strictly, read_json, resolve_folder, save_pretrained_whole, write_text
from common.errors import InputError
from common.runtime import move, pick_dtype
from generator.config import GeneratorConfig, TokenLayout, llama_config
from generator.positions import without_counting

CARD_FILE = "channeltok.json"


def build_generator(config: GeneratorConfig, layout: TokenLayout) -> LlamaForCausalLM:
    """A fresh model; its weights follow torch's global seed."""
    return LlamaForCausalLM(llama_config(config, layout))


def start_from(
    name_or_path: str | Path, layout: TokenLayout, size: GeneratorConfig
) -> tuple[LlamaForCausalLM, GeneratorConfig, Tensor | None]:
    """A trained generator with the classes of another data set: their rows are new, all else is kept.

    A new class begins as the null class, if the model was trained with one, and otherwise as the mean of
    the old classes; so the first pictures are of any class, and what all classes share need not be learned anew.

    Args:
        name_or_path: a folder that `train_ar.py` wrote, its generator/, or a name on the Hugging Face hub.
        layout: of the new classes.
        size: as the user gave it; must be the model's own, or the default.

    Returns:
        The model, its size, and its vectors of positions (C d), if it was saved with a block that makes them. The block
        is not trained but taken off, to be written anew when the model is saved.

    Raises:
        InputError: a model of another tokenizer, or of another size than was asked for.
    """
    folder = resolve_folder(name_or_path)
    model, old = load_generator(folder / "generator" if (folder / "generator").is_dir() else folder)
    for name in ("tokenizer_fingerprint", "num_channels", "num_bits"):
        there, wanted = getattr(old, name), getattr(layout, name)
        if there != wanted:
            raise InputError(
                f"init_from {name_or_path} was trained with {name} {there}, these tokens have {wanted}; "
                "extract them with the tokenizer of that model"
            )
    found = GeneratorConfig.of(model.config)
    given = dataclasses.replace(size, attention_dropout=found.attention_dropout)
    if given not in (found, GeneratorConfig(attention_dropout=found.attention_dropout)):
        wrong = next(name for name in asdict(found) if getattr(given, name) != getattr(found, name))
        raise InputError(
            f"{wrong} is {getattr(given, wrong)}, but init_from {name_or_path} has {getattr(found, wrong)}; "
            "leave the size out, it is the model's"
        )
    found = dataclasses.replace(found, attention_dropout=size.attention_dropout)
    vectors = None
    if old.first_block_counts:
        model, vectors = without_counting(model, old.num_channels)
    inside = dataclasses.replace(found, num_layers=model.config.num_hidden_layers)
    fresh = LlamaForCausalLM(llama_config(inside, layout))
    state = model.state_dict()
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        rows = state[name]
        codes, classes, null = rows.split([old.codebook_size, old.num_classes, 1])
        start = null if old.has_null_label else classes.mean(0, keepdim=True)
        state[name] = torch.cat([codes, start.expand(layout.num_classes, -1), start])
    fresh.load_state_dict(state)
    return fresh, found, vectors


def save_generator(model: LlamaForCausalLM, layout: TokenLayout, folder: str | Path, dtype: str = "float32") -> None:
    """Write config.json, channeltok.json and model.safetensors; each appears whole, the weights last."""
    write_text(Path(folder) / CARD_FILE, json.dumps(asdict(layout), indent=1))
    wanted = pick_dtype(dtype)
    save_pretrained_whole(model if model.dtype == wanted else move(copy.deepcopy(model), dtype=wanted), folder)


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
