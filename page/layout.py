"""Layout and events of the web page, built with Gradio."""

import base64
import html
import logging
import random
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from common.config import InputError
from common.images import captioned_table, save_animation
from page.config import PageConfig
from page.studio import MAX_FILE_BYTES, SKETCHES, Drawing, Studio

logger = logging.getLogger(__name__)
SHOWN_SIDE = 384  # pixels of a side on the page
CSS = f"""
.canvas {{ min-height: {SHOWN_SIDE + 48}px; text-align: center; }}
.canvas img {{ width: min({SHOWN_SIDE}px, 100%); margin: 0 auto 8px; border-radius: 8px; }}
.canvas .empty {{ height: {SHOWN_SIDE}px; display: flex; align-items: center; justify-content: center; opacity: .6; }}
.canvas progress {{ width: min({SHOWN_SIDE}px, 100%); accent-color: #6366f1; }}
.canvas > .wrap {{ overflow: visible !important; }} /* shows a visitor's place in the queue */
.counter {{ font-variant-numeric: tabular-nums; }}
.reconstructions img {{ max-width: 100%; }}
"""
INTRO = """
# ChannelTok
An image is drawn one *channel* at a time, coarse to fine. Stop at any number of channels k, and continue later: the
result is the same as without the stop.
"""


def data_url(kind: str, data: bytes) -> str:
    """The content of an image file of some kind (png, webp) as a data URL."""
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def png_url(image: Image.Image) -> str:
    """An image as a data URL."""
    with BytesIO() as file:
        image.save(file, format="PNG")
        return data_url("png", file.getvalue())


def download_link(name: str, url: str) -> str:
    """A link that saves a data URL as a file."""
    return f'<a href="{url}" download="channeltok-{name}">Save {name}</a>'


def canvas_html(drawing: Drawing, image: Image.Image, num_tokens: int, *, draft: bool = False) -> str:
    """An image with the counter of its tokens and of milliseconds."""
    k = drawing.num_tokens
    return (
        f'<img src="{png_url(image)}" alt="{"draft" if draft else "image"} of {k} tokens">'
        f'<progress max="{num_tokens}" value="{k}"></progress>'
        f'<div class="counter">k = <span class="k">{k}</span> of {num_tokens} · {1000 * drawing.seconds:.0f} ms</div>'
    )


def empty_html(text: str) -> str:
    """A canvas without an image."""
    return f'<div class="empty">{html.escape(text)}</div>'


@contextmanager
def shown_errors() -> Iterator[None]:
    """Show wrong input to the visitor who gave it; log other errors, so that the page continues to work."""
    try:
        yield
    except InputError as error:
        raise gr.Error(str(error), print_exception=False) from error
    except Exception as error:
        logger.exception("a request failed")
        raise gr.Error("this request failed; the server's log has the error", print_exception=False) from error


class Page:
    """The page: one set of controls, and tabs for drawing, sketches and photographs.

    Args:
        studio: draws.
        config: limits of the queue.
    """

    def __init__(self, studio: Studio, config: PageConfig):
        self.studio, self.config = studio, config

    def build(self) -> gr.Blocks:
        """The page, with its queue; `launch` starts the server."""
        with gr.Blocks(title="ChannelTok", analytics_enabled=False, delete_cache=(3600, 3600)) as page:
            gr.Markdown(INTRO)
            with gr.Row():
                with gr.Column(scale=1, min_width=280):
                    self.controls = self._controls()
                with gr.Column(scale=2), gr.Tabs():
                    with gr.Tab("Draw"):
                        self._draw_tab()
                    with gr.Tab("Sketches"):
                        self._sketches_tab()
                    with gr.Tab("Photograph"):
                        self._photograph_tab()
        page.queue(max_size=self.config.queue_size, default_concurrency_limit=self.config.concurrency, api_open=False)
        return page

    # --------------------------------------------------------------------------------- components

    def _controls(self) -> list[Any]:
        studio, defaults = self.studio, self.studio.pipeline.sampling()
        names = [(name.split(",")[0], label) for label, name in enumerate(studio.class_names)]
        label = gr.Dropdown(sorted(names), value=names[0][1], label="Class", filterable=True, elem_id="class")
        with gr.Row():
            seed = gr.Number(0, label="Seed", precision=0, minimum=0, elem_id="seed")
            gr.Button("Random seed", min_width=60).click(lambda: random.randrange(10**6), outputs=seed, queue=False)
        scale = gr.Slider(1, 10, defaults.cfg_scale, step=0.1, label="Guidance: strength of the class")
        temperature = gr.Slider(0, 1.5, defaults.temperature, step=0.05, label="Temperature: variety of tokens")
        refine = gr.Checkbox(
            studio.can_refine, label="Refine: add detail that the tokens do not hold", visible=studio.can_refine
        )
        return [label, seed, scale, temperature, refine]

    def _canvas(self, name: str, text: str) -> tuple[gr.HTML, gr.State, gr.Slider]:
        """Image, drawing, and a slider over the k drawn so far."""
        canvas = gr.HTML(empty_html(text), elem_id=name, elem_classes="canvas")
        drawing = gr.State(None, time_to_live=3600)
        slider = gr.Slider(
            1, self.studio.num_tokens, self.studio.num_tokens, step=1, elem_id=f"{name}-k",
            label="Show the image at fewer channels (nothing is drawn again)",
        )  # fmt: skip
        slider.input(self._show_prefix, [slider, drawing], canvas, show_progress="hidden", trigger_mode="always_last")
        return canvas, drawing, slider

    def _files(self, drawing: gr.State) -> None:
        with gr.Row():
            buttons = [gr.Button(f"Make {title}", min_width=80, size="sm") for title in ("PNG", "strip", "animation")]
        link = gr.HTML(elem_classes="download")
        for button, make in zip(buttons, (self._png, self._strip, self._animation), strict=True):
            button.click(make, drawing, link)

    def _draw_tab(self) -> None:
        with gr.Row():
            start = gr.Button("Draw", variant="primary", elem_id="draw")
            stop = gr.Button("Stop", variant="stop", elem_id="stop")
            more = gr.Button("Continue", elem_id="continue")
        canvas, drawing, slider = self._canvas("canvas", "Choose a class and press Draw")
        outputs = [canvas, drawing, slider]
        events: list[Any] = [
            start.click(self._draw, self.controls, outputs, show_progress="minimal", show_progress_on=canvas),
            more.click(self._continue, drawing, outputs, show_progress="minimal", show_progress_on=canvas),
        ]
        stopped = stop.click(None, cancels=events, queue=False)
        stopped.then(self._stopped, drawing, [canvas, slider], show_progress="hidden")
        self._files(drawing)

    def _sketches_tab(self) -> None:
        studio = self.studio
        start = gr.Button(f"{SKETCHES} sketches of {studio.sketch_tokens} tokens", variant="primary", elem_id="sketch")
        sketches = gr.State([], time_to_live=3600)
        with gr.Row():
            with gr.Column(min_width=300):
                gallery = gr.Gallery(
                    show_label=False, columns=3, height=440, allow_preview=False, format="png",
                    elem_id="gallery",
                )  # fmt: skip
            with gr.Column(min_width=300):
                canvas, drawing, slider = self._canvas("finished", "Choose a sketch to complete it")
        start.click(self._sketches, self.controls, [gallery, sketches])
        outputs = [canvas, drawing, slider]
        gallery.select(self._complete, sketches, outputs, show_progress="minimal", show_progress_on=canvas)
        self._files(drawing)

    def _photograph_tab(self) -> None:
        studio = self.studio
        file = gr.File(label="Photograph (PNG, JPEG or WebP)", type="filepath", elem_id="photograph", height=120)
        shown = gr.HTML(elem_classes="reconstructions", elem_id="reconstructions")
        photograph = gr.State(None, time_to_live=3600)
        kept = gr.Slider(1, studio.num_tokens - 1, min(16, studio.num_tokens - 1), step=1, label="Channels to keep")
        start = gr.Button("Draw the rest, as the chosen class", variant="primary", elem_id="redraw")
        canvas, drawing, slider = self._canvas("redrawn", "Upload a photograph, then draw its remaining channels")
        file.upload(self._reconstruct, [file, *self.controls], [shown, photograph])
        inputs = [photograph, kept, *self.controls]
        outputs = [canvas, drawing, slider]
        start.click(self._redraw, inputs, outputs, show_progress="minimal", show_progress_on=canvas)
        self._files(drawing)

    # --------------------------------------------------------------------------------- events

    def _frames(self, drawing: Drawing) -> Iterator[tuple[str, Drawing, Any]]:
        total = self.studio.num_tokens
        for found, image in self.studio.draw(drawing):
            k = found.num_tokens
            yield canvas_html(found, image, total, draft=k < total), found, gr.Slider(maximum=max(k, 2), value=k)

    def _streamed(self, drawing: Callable[[], Drawing]) -> Iterator[Any]:
        with shown_errors():
            yield from self._frames(drawing())

    def _draw(self, *controls: Any) -> Iterator[Any]:
        yield from self._streamed(lambda: Drawing(choice=self.studio.choice(*controls)))

    def _continue(self, drawing: Drawing | None) -> Iterator[Any]:
        yield from self._streamed(lambda: _required(drawing))

    def _complete(self, sketches: Sequence[Drawing], event: gr.SelectData) -> Iterator[Any]:
        yield from self._streamed(lambda: sketches[event.index])

    def _redraw(self, photograph: Drawing | None, kept: int, *controls: Any) -> Iterator[Any]:
        def started() -> Drawing:
            if photograph is None:
                raise InputError("there is no photograph; upload one")
            if not 1 <= kept < self.studio.num_tokens:
                raise InputError(f"channels to keep is {kept}; allowed are 1..{self.studio.num_tokens - 1}")
            choice = self.studio.choice(*controls)
            return Drawing(choice=choice, tokens=photograph.tokens[: int(kept)])

        yield from self._streamed(started)

    @shown_errors()
    def _show_prefix(self, k: int, drawing: Drawing | None) -> str:
        drawing = _required(drawing)
        shown = replace(drawing, tokens=drawing.tokens[: max(1, int(k))])
        return canvas_html(shown, self.studio.image(shown), self.studio.num_tokens)

    @shown_errors()
    def _stopped(self, drawing: Drawing | None) -> Any:
        """Replace the draft that is shown."""
        if drawing is None:
            return gr.skip(), gr.skip()
        return canvas_html(drawing, self.studio.image(drawing), self.studio.num_tokens), drawing.num_tokens

    def _sketches(self, *controls: Any) -> Iterator[tuple[list[tuple[Image.Image, str]], list[Drawing]]]:
        with shown_errors():
            sketches = self.studio.sketches(self.studio.choice(*controls))
            titles = [f"seed {sketch.choice.seed}" for sketch in sketches]
            for images in self.studio.sketch_images(sketches):
                enlarged = [image.resize((128, 128), Image.Resampling.NEAREST) for image in images]
                yield list(zip(enlarged, titles, strict=True)), sketches

    @shown_errors()
    def _reconstruct(self, path: str, *controls: Any) -> tuple[str, Drawing]:
        studio = self.studio
        photograph = studio.photograph(path, replace(studio.choice(*controls), refine=False))
        lengths = studio.lengths(studio.num_tokens)
        images = [*studio.prefixes(photograph, lengths), studio.square(path)]
        labels = [*(f"{k}: {k * studio.bits:,} bits" for k in lengths), "photograph"]
        table = captioned_table([images], column_labels=labels, min_side=112)
        return f'<img src="{png_url(table)}" alt="reconstructions by number of channels">', photograph

    @shown_errors()
    def _png(self, drawing: Drawing | None) -> str:
        return download_link("image.png", png_url(self.studio.image(_required(drawing))))

    @shown_errors()
    def _strip(self, drawing: Drawing | None) -> str:
        drawing = _required(drawing)
        lengths = self.studio.lengths(drawing.num_tokens)
        strip = captioned_table([self.studio.prefixes(drawing, lengths)], column_labels=[f"k={k}" for k in lengths])
        return download_link("strip.png", png_url(strip))

    @shown_errors()
    def _animation(self, drawing: Drawing | None) -> str:
        drawing = _required(drawing)
        stride = max(1, drawing.num_tokens // 32)
        images = self.studio.prefixes(drawing, range(1, drawing.num_tokens, stride), draft=True)
        images.append(self.studio.image(drawing))
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "animation.webp"
            save_animation(images, path)
            return download_link("animation.webp", data_url("webp", path.read_bytes()))


def _required(drawing: Drawing | None) -> Drawing:
    if drawing is None:
        raise InputError("there is no image yet; draw one")
    return drawing


def serve(studio: Studio, config: PageConfig) -> None:
    """Start the server and wait until it is stopped.

    Raises:
        InputError: a port that is in use.
    """
    page = Page(studio, config).build()
    fonts = ["system-ui", "sans-serif"]
    try:
        page.launch(
            server_name=config.host, server_port=config.port, share=False, max_file_size=MAX_FILE_BYTES,
            theme=gr.themes.Soft(font=fonts, font_mono=["monospace"]), css=CSS, footer_links=[], ssr_mode=False,
            enable_monitoring=False, quiet=True, max_threads=max(40, 2 * config.concurrency), show_error=True,
        )  # fmt: skip
    except OSError as error:
        raise InputError(
            f"port {config.port} of {config.host} cannot be used ({error}); give another --port"
        ) from error
