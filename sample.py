"""Draw pictures of classes, one latent channel at a time: see `--help`; without flags, a few classes at growing k.

`accelerate launch sample.py ...` shares the images out to several processes, which write the same pictures as one.
"""

from common import cli
from generator.config import SampleConfig, SamplingConfig

SamplingFlags = cli.unset(SamplingConfig, "default: the model's own, or those of the tokens to continue")


def main() -> None:
    """Parse, then draw."""
    config, flags = cli.parse(SampleConfig, SamplingFlags, description=__doc__)
    given = {name: value for name, value in vars(flags).items() if value is not None}
    SamplingConfig(**given)  # refuses wrong values before a model is loaded
    # here, so that --help and mistakes are answered without loading torch
    from generator.session import draw

    draw(config, given)


if __name__ == "__main__":
    cli.run(main)
