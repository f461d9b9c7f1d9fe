"""How the page is laid out: the components, what happens when a button is pressed, and the texts around them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from dualrefnet.page import scripts as scripts
from dualrefnet.page.answer import NOTICE, data_uri
from dualrefnet.page.examples import Example
from dualrefnet.page.form import Question, fitting, make_component
from dualrefnet.page.heat import to_jpeg
from dualrefnet.page.quiet_gradio import gradio

if TYPE_CHECKING:
    from dualrefnet.deploy.predictor import Predictor
    from dualrefnet.page.mount import Page

TITLE = "Skin lesion classifier"
# Of one lesion.
PHOTOGRAPHS = 3


def build_blocks(page: Page, examples: Sequence[Example]) -> gradio.Blocks:
    """Lay the page out.

    Args:
        page: its steps.
        examples: what can be tried.
    """
    predictor, questions = page.predictor, page.questions
    # Files that Gradio itself might write go after minutes too.
    blocks = gradio.Blocks(
        title=TITLE, analytics_enabled=False, delete_cache=(60, page.uploads.seconds), fill_width=True
    )
    with blocks:
        gradio.HTML(_header(predictor), elem_id="header")
        gradio.HTML(f"<p><strong>{NOTICE}</strong></p>", elem_id="notice")
        # What is asked; what the server told, the label to explain and what it was asked for that; the explanation and
        # the same.
        asked, told, label, of, why, why_of = (gradio.Textbox(visible=False) for _ in range(6))
        with gradio.Row(elem_id="columns"):
            with gradio.Column(elem_id="ask", min_width=300):
                photographs = _photographs(predictor)
                answers = _form(questions)
                with gradio.Row(elem_id="buttons"):
                    clear = gradio.Button("Clear", variant="secondary", elem_id="clear", min_width=80)
                    start = gradio.Button("Classify", variant="primary", elem_id="classify", min_width=80)
            with gradio.Column(elem_id="told", min_width=300):
                answer = gradio.HTML(scripts.READY, elem_id="answer", js_on_load=scripts.live("Answer"))
                explanation = gradio.HTML("", elem_id="explanation", js_on_load=scripts.live("What mattered"))
        buttons = _examples(page, examples)
        gradio.HTML(_about(predictor), elem_id="about")

        inputs: list[Any] = [*photographs, *answers]
        # Without Gradio's queue: it lives in one process, and there may be several.
        quiet: dict[str, Any] = {"queue": False, "show_progress": "hidden"}
        # The server gets texts as they are, and shows HTML as it is.
        served: dict[str, Any] = {**quiet, "preprocess": False, "api_visibility": "private"}
        start.click(
            None,
            js=scripts.gather(_names(questions), len(photographs)),
            inputs=inputs,
            outputs=[asked, answer, explanation],
            **quiet,
        ).then(page.classify, inputs=[asked], outputs=[told, label, of], api_name="classify", **served).then(
            None,
            js=scripts.show_answer(),
            inputs=[asked, of, told, label, answer, explanation],
            outputs=[answer, explanation],
            **quiet,
        ).then(page.explain, inputs=[of, label], outputs=[why, why_of], api_name="explain", **served).then(
            None, js=scripts.SHOW_EXPLANATION, inputs=[asked, why_of, why, explanation], outputs=[explanation], **quiet
        )
        if inputs:
            gradio.on([component.change for component in inputs], None, js=scripts.STALE, **quiet)

        filled, empty = [*inputs, answer, explanation, asked], [None] * len(photographs)
        clear.click(None, js=scripts.fill(empty, _held(questions, {})), outputs=filled, **quiet)
        for number, (button, example) in enumerate(zip(buttons, examples, strict=True), 1):
            pictures = [f"example-{number}.png", *empty[1:]] if photographs else []
            held = _held(questions, fitting(questions, example.answers))
            button.click(None, js=scripts.fill(pictures, held), outputs=filled, **quiet)
    return blocks


def _photographs(predictor: Predictor) -> list[gradio.Image]:
    if not predictor.reads_image:
        return []
    words = "Photograph of the lesion" if predictor.needs_image else "Photograph of the lesion (optional)"
    gradio.HTML(f"<h2>{words}</h2>")
    found = [_photograph(1, words)]
    gradio.Button("Take a photograph", elem_id="camera", variant="secondary").click(
        None, js=scripts.CAMERA, queue=False, show_progress="hidden"
    )
    with gradio.Accordion("More photographs of the same lesion", open=False, elem_id="more"):
        found += [
            _photograph(number, f"Photograph {number} of the same lesion") for number in range(2, PHOTOGRAPHS + 1)
        ]
    return found


def _names(questions: Sequence[Question]) -> list[str]:
    return [question.name for question in questions]


def _photograph(number: int, words: str) -> gradio.Image:
    return gradio.Image(
        label=words,
        sources=["upload"],
        type="filepath",
        buttons=[],
        show_label=False,
        height=240,
        elem_id=f"photograph-{number}",
        elem_classes="photograph",
        alt_text=words,
        placeholder="Choose a photograph, or drop one here",
    )


def _form(questions: Sequence[Question]) -> list[gradio.components.Component]:
    if not questions:
        return []
    first = [question for question in questions if question.first] or list(questions)
    rest = [question for question in questions if question not in first]
    gradio.HTML(
        "<h2>About the patient and the lesion</h2><p>The questions at the top change the answer most. Whatever stays at “unknown” makes "
        "it less certain.</p>"
    )
    with gradio.Group(elem_classes="questions"):
        components = [make_component(question) for question in first]
    if rest:
        with (
            gradio.Accordion(f"{len(rest)} more questions", open=False, elem_id="rest"),
            gradio.Group(elem_classes="questions"),
        ):
            components += [make_component(question) for question in rest]
    return components


def _examples(page: Page, examples: Sequence[Example]) -> list[gradio.Button]:
    """Write the examples' pictures into the folder, and make their buttons."""
    gradio.HTML(
        "<h2>Or try an example</h2><p>Drawn by a program, <strong>not clinical</strong>.</p>", elem_id="examples-title"
    )
    buttons, pictured = [], page.predictor.reads_image
    with gradio.Row(elem_id="examples"):
        for number, example in enumerate(examples, 1):
            page.uploads.write(f"example-{number}.png", example.picture)
            small = data_uri("jpeg", to_jpeg(example.picture[::4, ::4]))
            buttons.append(
                gradio.Button(
                    example.title,
                    elem_id=f"example-{number}",
                    elem_classes=["example", *(["pictured"] if pictured else [])],
                    min_width=80,
                )
            )
            if pictured:
                gradio.HTML(
                    f"<style>#example-{number}::before {{ background-image: url({small}); }}</style>", padding=False
                )
    return buttons


def _held(questions: Sequence[Question], values: Mapping[str, Any]) -> list[Any]:
    """Return what the components of the questions hold: some answers, and "unknown" for everything else."""
    return [values.get(question.name, "") for question in questions]


def _header(predictor: Predictor) -> str:
    drawn = " It was trained on <strong>DRAWN pictures, not clinical</strong> ones." if is_drawn(predictor) else ""
    shortcut = predictor.shortcut
    warning = ""
    if shortcut is not None:
        warning = (
            '<div class="alarm"><strong>Don\'t use it where answers may be missing.</strong> '
            f"{escape(shortcut[:1].upper() + shortcut[1:])}.</div>"
        )
    return (
        f"{warning}<header><h1>Skin lesion classifier</h1><p>Tells {len(predictor.classes)} kinds of skin lesion apart, as learned from "
        f"{escape(predictor.title)}.{drawn}</p></header>"
    )


def _about(predictor: Predictor) -> str:
    names = ", ".join(escape(predictor.class_names.get(label, label)) for label in predictor.classes)
    return (
        f"<details><summary>About this model</summary><p>{escape(predictor.name)}, trained on {escape(predictor.title)}. It knows: "
        f"{names}. "
        "Whatever else it is shown, it calls one of these too.</p><p>Photographs are stripped of everything but their pixels, stay on "
        "this server, and are deleted after minutes.</p></details>"
    )


def is_drawn(predictor: Predictor) -> bool:
    """Return whether the model learned from pictures that a program drew."""
    return bool(predictor.description["dataset"]["drawn"])
