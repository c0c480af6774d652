"""A page for a browser, made with gradio: search a folder of images, ask about one, see where words are found.

It listens on this machine alone unless told otherwise, asks nobody else for anything it can do without, and serves no
file: what it shows are small copies. Captions, file names and messages are anybody's text and go into components that
show text as text; gradio's own error messages would take it for HTML, so none is raised.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable
from pathlib import Path

from PIL import Image

from albef_ds.data.images import ImageError, decode_image
from albef_ds.inference.explain import overlay, shown, small
from albef_ds.inference.inputs import images_in
from albef_ds.inference.model import Albef, UseError
from albef_ds.inference.search import Found, ImageIndex

log = logging.getLogger(__name__)

MOST = 60  # results, and MB of an uploaded image
LONGEST_TEXT = 2000  # characters of a question or text


def serve(model: Albef, images: str | Path, answering: Albef | None, host: str, port: int) -> None:
    """Until it is interrupted. Raises ImageError where the folder has no image that can be read."""
    page, launch = build_page(model, images, answering)
    page.launch(**launch, server_name=host, server_port=port)


def build_page(model: Albef, images: str | Path, answering: Albef | None = None):
    """The page and what its launch() has to be given.

    Args:
        model: searches and shows where words are, where its kind can.
        images: the folder; nothing outside it can be asked for.
        answering: answers questions; None: `model`, where it can.

    Raises:
        UseError: gradio is not installed. ImageError: no image that can be read in the folder.
    """
    gradio = _gradio()
    hands = Hands.build(model, Path(images), answering or model)
    with gradio.Blocks(analytics_enabled=False, title="albef_ds") as page:
        _search_tab(gradio, hands)
        _answer_tab(gradio, hands)
        _words_tab(gradio, hands)
    system = gradio.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"])  # none from the web
    launch = {"share": False, "allowed_paths": [], "max_file_size": f"{MOST}mb", "theme": system, "footer_links": []}
    return page, launch | {"ssr_mode": False, "enable_monitoring": False, "mcp_server": False, "run_history": False}


class Hands:
    """What the page's buttons do; every method returns what to show and a line of text."""

    def __init__(self, model: Albef, index: ImageIndex | None, folder: Path, answering: Albef):
        self.model, self.index, self.answering = model, index, answering
        images = index.images if index else images_in(folder)
        self.names = {str(image.relative_to(folder)): image for image in images}
        self._alone = threading.Lock()  # a heatmap changes how the model computes while it is made

    @classmethod
    def build(cls, model: Albef, folder: Path, answering: Albef) -> Hands:
        if not folder.is_dir():
            raise ImageError(str(folder), "no such folder")
        index = ImageIndex.build(model, folder) if model.can("align") else None
        for fault in index.faults if index else ():
            log.warning("left out: %s", fault)
        return cls(model, index, folder, answering)

    def search(self, text: str, upload: str | None, top: float):
        def find() -> list[Found]:
            if text.strip():
                return self.index.by_text(self.model, text[:LONGEST_TEXT], int(top))
            return self.index.by_image(self.model, self._picture(None, upload), int(top))

        found, said = self._tried(find)
        names = {image: name for name, image in self.names.items()}
        panels = [(small(decode_image(f.image)), f"{f.similarity:+.3f}  {shown(names[f.image])}") for f in found or ()]
        return panels, said or f"{len(panels)} of {len(self.names)} images"

    def answer(self, name: str | None, upload: str | None, question: str):
        def ask():
            if not question.strip():
                raise UseError("Write a question.")
            picture = self._picture(name, upload)
            return picture, self.answering.answer(picture, question[:LONGEST_TEXT], k=3)[0]

        found, said = self._tried(ask)
        if found is None:
            return None, said
        picture, answers = found
        return small(picture), "\n".join(f"{shown(a.text)}  ({a.probability:.1%})" for a in answers)

    def words(self, name: str | None, upload: str | None, text: str):
        def explain():
            if not text.strip():
                raise UseError("Write a text.")
            picture = self._picture(name, upload)
            return picture, self.model.heatmaps(picture, text[:LONGEST_TEXT])

        found, said = self._tried(explain)
        if found is None:
            return [], said
        picture, heatmap = small(found[0]), found[1]
        panels = [(overlay(picture, heatmap.whole), "the whole text")]
        panels += [(overlay(picture, m), shown(w)) for w, m in zip(heatmap.words, heatmap.maps, strict=True)]
        return panels, f"matching score {heatmap.score:+.2f}"

    def _picture(self, name: str | None, upload: str | None) -> Image.Image:
        if upload:
            return decode_image(upload, key=Path(upload).name)
        if name in self.names:  # and in no other way does a name become a path
            return decode_image(self.names[name])
        raise UseError("Choose an image, or upload one.")

    def _tried(self, do: Callable):
        try:
            with self._alone:
                return do(), ""
        except (UseError, ImageError) as error:
            return None, shown(str(error))


def _search_tab(gradio, hands: Hands) -> None:
    with gradio.Tab("Search"):
        if hands.index is None:
            _needed(gradio, hands.model, "searches", "a pre-training, retrieval or grounding checkpoint")
            return
        with gradio.Row():
            text = gradio.Textbox(label="Text", elem_id="search-text", scale=3)
            upload = _upload(gradio, "or an image")
            top = gradio.Slider(1, MOST, value=12, step=1, label="Images")
        button = gradio.Button("Search", elem_id="search-button", variant="primary")
        said = gradio.Textbox(label="Found", interactive=False, elem_id="search-said")
        gallery = gradio.Gallery(label="Images", columns=4, elem_id="search-found", format="png")
        for event in (button.click, text.submit):
            event(hands.search, [text, upload, top], [gallery, said], api_visibility="private")


def _answer_tab(gradio, hands: Hands) -> None:
    with gradio.Tab("Ask"):
        if not hands.answering.can("answer"):
            _needed(gradio, hands.answering, "answers questions", "a VQA checkpoint: start with --answering MODEL")
            return
        name, upload = _choice(gradio, hands, "ask")
        question = gradio.Textbox(label="Question", elem_id="ask-text")
        button = gradio.Button("Ask", elem_id="ask-button", variant="primary")
        said = gradio.Textbox(label="Answers", interactive=False, lines=3, elem_id="ask-said")
        picture = gradio.Image(label="Image", interactive=False, height=320, format="png")
        for event in (button.click, question.submit):
            event(hands.answer, [name, upload, question], [picture, said], api_visibility="private")


def _words_tab(gradio, hands: Hands) -> None:
    with gradio.Tab("Words"):
        if not hands.model.can("align"):
            _needed(gradio, hands.model, "shows where words are", "a pre-training, retrieval or grounding checkpoint")
            return
        name, upload = _choice(gradio, hands, "words")
        text = gradio.Textbox(label="Text", elem_id="words-text")
        button = gradio.Button("Show", elem_id="words-button", variant="primary")
        said = gradio.Textbox(label="Score", interactive=False, elem_id="words-said")
        gallery = gradio.Gallery(label="Heatmaps", columns=4, elem_id="words-maps", format="png")
        for event in (button.click, text.submit):
            event(hands.words, [name, upload, text], [gallery, said], api_visibility="private")


def _choice(gradio, hands: Hands, where: str):
    with gradio.Row():
        name = gradio.Dropdown(
            list(hands.names), value=None, label="Image of the folder", elem_id=f"{where}-image", scale=3
        )
        return name, _upload(gradio, "or one of your own")


def _upload(gradio, label: str):
    # Not gradio's Image, which would open the file with any of Pillow's decoders.
    return gradio.File(label=label, file_types=["image"], type="filepath", height=160)


def _needed(gradio, model: Albef, does: str, needed: str) -> None:
    line = f"This checkpoint is of {model.task}. What {does} is {needed}."
    gradio.Textbox(line, show_label=False, interactive=False)


def _gradio():
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    try:
        import gradio
    except ImportError:
        raise UseError("the page needs gradio: pip install 'albef_ds[page]'") from None
    return gradio
