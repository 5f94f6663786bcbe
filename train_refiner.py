"""Train a refiner on images and a frozen tokenizer: see `--help`, configs/ and docs/refiner.md."""

from dataclasses import asdict
from typing import TYPE_CHECKING

from common import cli
from common.errors import InputError
from refiner.config import RefinerSize, RefinerTrainingConfig
from tokenizer.settings import AugmentationConfig, DataConfig

if TYPE_CHECKING:
    import torch

    from refiner.training import Codec
    from tokenizer.tokenizer import ChannelTokenizer

# modules that load torch are imported in functions, so that --help and mistakes are answered at once
CONFIGS = RefinerTrainingConfig, RefinerSize, DataConfig, AugmentationConfig


def main() -> None:
    """Parse, open data and tokenizer, then train."""
    training, size, data, augmentation = cli.parse(*CONFIGS, description=__doc__)
    from refiner.training import RefinerTrainer
    from tokenizer.tokenizer import ChannelTokenizer
    from tokenizer.training import open_images

    tokenizer = ChannelTokenizer.from_pretrained(training.tokenizer)
    images = open_images(
        data, augmentation, tokenizer.config.image_size,
        seed=training.seed, strict=training.strict, names_file=training.class_names,
    )  # fmt: skip
    identity = {"augmentation": asdict(augmentation)}
    RefinerTrainer(training, size, images, lambda device: codec(tokenizer, training, device), identity).run()


def codec(tokenizer: "ChannelTokenizer", training: RefinerTrainingConfig, device: "torch.device") -> "Codec":
    """A tokenizer on a device, with the generator that continues its tokens, if one is wanted."""
    from common.checkpoint import fingerprint
    from common.runtime import move
    from generator.pipeline import ChannelTokPipeline
    from refiner.training import Codec
    from tokenizer.config import evaluation_lengths
    from tokenizer.decoding import PictureDecoder

    weights = fingerprint(tokenizer)
    move(tokenizer, device).requires_grad_(False)
    continue_tokens = None
    if training.generator is not None:
        pipeline = ChannelTokPipeline.from_pretrained(training.generator, str(device))
        if fingerprint(pipeline.tokenizer) != weights:
            raise InputError(f"generator {training.generator} has another tokenizer than {training.tokenizer}")

        def continue_tokens(tokens, kept, wanted, labels, seeds):
            return pipeline(labels, wanted, seeds, prefix=tokens, prefix_lengths=kept).tokens

    return Codec(
        fingerprint=weights,
        image_size=tokenizer.config.image_size,
        num_channels=tokenizer.config.num_channels,
        num_bits=tokenizer.config.num_bits,
        lengths=evaluation_lengths(tokenizer.config.num_channels),
        tokenize=tokenizer.tokenize,
        decode=PictureDecoder(tokenizer),
        continue_tokens=continue_tokens,
    )


if __name__ == "__main__":
    cli.run(main)
