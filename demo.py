"""Web page that draws images channel by channel, with buttons to stop and continue: `uv run --extra demo demo.py`."""

from common import cli
from common.config import InputError
from page.config import PageConfig


def main() -> None:
    """Parse, load the model, and serve the page."""
    (config,) = cli.parse(PageConfig, description=__doc__)
    # here, so that --help and mistakes are answered without loading torch
    from common.runtime import pick_dtype
    from generator.pipeline import ChannelTokPipeline

    try:
        from page.layout import serve
    except ImportError as error:
        raise InputError(
            "the page needs Gradio; install it with `uv sync --extra demo` or `pip install .[demo]`"
        ) from error
    from page.studio import Studio

    pipeline = ChannelTokPipeline.from_pretrained(
        config.model, config.device, pick_dtype(config.dtype), compile=config.compile
    )
    serve(Studio(pipeline), config)


if __name__ == "__main__":
    cli.run(main)
