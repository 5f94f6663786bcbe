"""Train a refiner on images and a frozen tokenizer: see `--help`, configs/ and docs/refiner.md."""

from dataclasses import asdict

from common import cli
from refiner.config import RefinerSize, RefinerTrainingConfig
from tokenizer.settings import AugmentationConfig, DataConfig

CONFIGS = RefinerTrainingConfig, RefinerSize, DataConfig, AugmentationConfig


def main() -> None:
    """Parse, open data and tokenizer, then train."""
    training, size, data, augmentation = cli.parse(*CONFIGS, description=__doc__)
    # here, so that --help and mistakes are answered without loading torch
    from generator.pipeline import ChannelTokPipeline
    from refiner.training import RefinerTrainer
    from tokenizer.config import evaluation_lengths
    from tokenizer.decoding import PictureDecoder
    from tokenizer.tokenizer import ChannelTokenizer
    from tokenizer.training import open_images

    tokenizer = ChannelTokenizer.from_pretrained(training.tokenizer)
    images = open_images(
        data, augmentation, tokenizer.config.image_size,
        seed=training.seed, strict=training.strict, names_file=training.class_names,
    )  # fmt: skip
    RefinerTrainer(
        training, size, images, tokenizer, evaluation_lengths(tokenizer.config.num_channels), PictureDecoder,
        ChannelTokPipeline.from_pretrained, identity={"augmentation": asdict(augmentation)},
    ).run()  # fmt: skip


if __name__ == "__main__":
    cli.run(main)
