"""An answer and its explanation as HTML that a screen reader can read; everything from outside is escaped."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dualrefnet.page.form import Question
from dualrefnet.page.heat import enlarge, overlay, scale, to_jpeg, to_png

if TYPE_CHECKING:
    from dualrefnet.deploy.predictor import Explanation, Prediction, Predictor

NOTICE = "For research. Not a medical device. Not a diagnosis."
# Smaller changes are shown as none; in percentage points.
_LEAST = 0.05
_UNLIKE = "This picture doesn't look like the photographs that the model learned from. Don't rely on the answer."


def answer_html(prediction: Prediction, predictor: Predictor, questions: Sequence[Question], photographs: int) -> str:
    """Describe what the model says.

    Args:
        prediction: of the model.
        predictor: the model, for its names.
        questions: its form, for theirs.
        photographs: how many were read.
    """
    unlike = prediction.out_of_scope is not None and prediction.out_of_scope > 1
    label = prediction.label
    parts = ["<h2>Answer</h2>"]
    if unlike:
        parts.append(f'<div class="alarm"><strong>Not a picture for this model.</strong> {_UNLIKE}</div>')
    pooled = f" {photographs} photographs were read as one lesion." if photographs > 1 else ""
    parts.append(
        f'<p class="likeliest{" unsure" if unlike else ""}"><span class="small">Likeliest of {len(predictor.classes)} classes</span> '
        f"<strong>{_name(predictor, label, capital=True)}</strong> "
        f'<span class="small">with a probability of {percent(prediction.probabilities[label])}.{pooled}</span></p>'
    )
    sentence = _set_sentence(prediction, predictor)
    if sentence:
        parts.append(f"<p>{sentence}</p>")
    parts += [
        _malignancy(prediction, predictor),
        _table(prediction, predictor),
        _warnings(prediction.warnings, questions),
    ]
    parts.append(f'<p class="notice">{NOTICE}</p>')
    return f'<div class="answer given">{"".join(parts)}</div>'


def explanation_html(
    explanation: Explanation,
    photograph: NDArray[np.uint8] | None,
    form: Mapping[str, Any],
    predictor: Predictor,
    questions: Sequence[Question],
    photographs: int,
) -> str:
    """Describe what mattered for an answer.

    Args:
        explanation: of the model.
        photograph: (S, S, 3) as the model sees it; None if it read none.
        form: the answers that were given.
        predictor: the model, for its names.
        questions: its form.
        photographs: how many were read; only the first is explained.
    """
    name = _name(predictor, explanation.label)
    parts = ["<h2>What mattered</h2>"]
    if explanation.saliency is not None and photograph is not None:
        parts.append(_heat(explanation.saliency, photograph, name, photographs))
    if questions:
        parts.append(_fields(explanation.fields, form, name, questions))
    parts.append(
        '<p class="small">An explanation shows what this model reacted to. It doesn\'t show that the answer is right.</p>'
    )
    return f'<div class="answer">{"".join(parts)}</div>'


def problem_html(message: str, title: str = "No answer") -> str:
    """Say what went wrong."""
    return f'<div class="answer"><h2>{escape(title)}</h2><div class="problem">{escape(message[:1].upper() + message[1:])}</div></div>'


def data_uri(kind: str, content: bytes) -> str:
    """Return a picture that stands in the page itself."""
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def percent(probability: float) -> str:
    """Return a probability for people; never 0% or 100%."""
    if probability < 0.01:
        return "less than 1%"
    return "more than 99%" if probability > 0.99 else f"{round(100 * probability)}%"


def _short(probability: float) -> str:
    """Return a probability for a narrow column."""
    return percent(probability).replace("less than ", "&lt;\u00a0").replace("more than ", "&gt;\u00a0")


def _name(predictor: Predictor, label: str, capital: bool = False) -> str:
    words = predictor.class_names.get(label, label)
    return escape(words[:1].upper() + words[1:] if capital else words)


def _set_sentence(prediction: Prediction, predictor: Predictor) -> str:
    if not prediction.likely or predictor.coverage is None:
        return ""
    names = [f"<strong>{_name(predictor, label)}</strong>" for label in prediction.likely]
    start = f"With {100 * predictor.coverage:g}% coverage the answer is"
    if len(names) == 1:
        return f"{start} {names[0]} alone."
    if len(names) == len(predictor.classes):
        return f"{start} any of the {len(names)} classes: the model can't narrow it down."
    return f"{start} one of: {', '.join(names[:-1])} or {names[-1]}."


def _malignancy(prediction: Prediction, predictor: Predictor) -> str:
    if prediction.malignancy is None:
        return ""
    names = [_name(predictor, label) for label in predictor.malignant]
    meant = f"{', '.join(names[:-1])} or {names[-1]}" if len(names) > 1 else names[0]
    advice = ""
    if prediction.refer is not None:
        words = "Referral advised" if prediction.refer else "Below the referral threshold for such an input"
        given = f' <span class="small">({escape(prediction.availability)})</span>' if prediction.availability else ""
        advice = f'<p class="advice {"yes" if prediction.refer else "no"}"><strong>{words}</strong>{given}</p>'
    return (
        f'<div class="malignancy"><p><strong>{percent(prediction.malignancy)}</strong> probability of a malignant lesion '
        f'<span class="small">({meant})</span></p>{advice}</div>'
    )


def _table(prediction: Prediction, predictor: Predictor) -> str:
    rows = []
    for label in sorted(prediction.probabilities, key=prediction.probabilities.__getitem__, reverse=True):
        probability = prediction.probabilities[label]
        # A bar says what the number beside it says; a screen reader reads the number.
        bar = f'<div class="bar" aria-hidden="true"><div style="width:{100 * min(1, max(0, probability)):.1f}%"></div></div>'
        mark = ' <span class="mark">malignant</span>' if label in predictor.malignant else ""
        rows.append(
            f'<tr><th scope="row">{_name(predictor, label, capital=True)}{mark}{bar}</th><td>{_short(probability)}</td></tr>'
        )
    return (
        '<table class="probabilities"><caption>Probability of each class</caption><thead class="unseen"><tr><th scope="col">Class</th>'
        f'<th scope="col">Probability</th></tr></thead><tbody>{"".join(rows)}</tbody></table>'
    )


def _warnings(warnings: Sequence[str], questions: Sequence[Question]) -> str:
    if not warnings:
        return ""
    return f'<h3>Please note</h3><ul class="warnings">{"".join(f"<li>{_warning(text, questions)}</li>" for text in warnings)}</ul>'


def _warning(text: str, questions: Sequence[Question]) -> str:
    """Name the unanswered questions in words; everything else stands as the model says it."""
    texts = {question.name: question.text for question in questions}
    how, _, rest = text.partition(": ")
    names = rest.split(", ")
    if how.startswith("missing") and all(name in texts for name in names):
        asked = "".join(f"<li>{escape(texts[name])}</li>" for name in names)
        said = f"{len(names)} of {len(questions)} questions unanswered"
        deciding = sum(question.first and question.name in names for question in questions)
        if deciding:
            said += f", {deciding} of them among those that change the answer most: filling them in may change it"
        return f"<details><summary>{said}</summary><ul>{asked}</ul></details>"
    return escape(text[:1].upper() + text[1:])


def _heat(heat: NDArray[np.float32], photograph: NDArray[np.uint8], name: str, photographs: int) -> str:
    which = " Only the first photograph is explained." if photographs > 1 else ""
    largest = 100 * float(heat.max())
    if largest < _LEAST:
        return f"<h3>In the photograph</h3><p>Covering no single place lowers the probability of {name}.{which}</p>"
    plain = data_uri("jpeg", to_jpeg(enlarge(photograph)))
    warm = data_uri("jpeg", to_jpeg(overlay(photograph, heat)))
    return (
        "<h3>In the photograph</h3>"
        f"<p>Bright places mattered most: covering the brightest lowers the probability of {name} by {largest:.1f} percentage points. "
        f"The line runs where it is half as much.{which}</p>"
        f'<div class="pair"><figure><img src="{plain}" alt="The photograph as the model sees it: square, colours balanced." width="480" '
        'height="480"><figcaption>As the model sees it</figcaption></figure>'
        f'<figure><img src="{warm}" alt="The same with a heat map over it." width="480" height="480">'
        "<figcaption>What covering a place changes</figcaption></figure></div>"
        f'<div class="scale"><span>0</span><img src="{data_uri("png", to_png(scale()))}" alt="from dark to bright"><span>{largest:.1f} '
        "points</span></div>"
    )


def _fields(changes: Mapping[str, float], form: Mapping[str, Any], name: str, questions: Sequence[Question]) -> str:
    asked = {question.name: question for question in questions}
    order = sorted((field for field in changes if field in asked), key=lambda field: -abs(changes[field]))
    if not order:
        return (
            "<h3>In the answers</h3><p>No question was answered. The probabilities rest on the photograph alone, and answers may change "
            "them.</p>"
        )
    first = order[0]
    points = 100 * changes[first]
    if abs(points) < _LEAST:
        sentence = f"No single answer changed the probability of {name}."
    else:
        verb = "raised" if points > 0 else "lowered"
        sentence = (
            f"The answer that mattered most is “{escape(asked[first].words(form.get(first)))}” to “{escape(asked[first].text)}”: it {verb} "
            f"the probability of {name} by {abs(points):.1f} percentage points against leaving it unknown."
        )
    most = max(_LEAST, *(100 * abs(changes[field]) for field in order))
    rows = "".join(_field_row(asked[field], form.get(field), 100 * changes[field], most) for field in order)
    return (
        f'<h3>In the answers</h3><p>{sentence}</p><table class="changes"><caption>What each answer did to the probability of {name}'
        '</caption><thead class="unseen"><tr><th scope="col">Question and answer</th><th scope="col">Change in percentage points</th></tr>'
        f"</thead><tbody>{rows}</tbody></table>"
    )


def _field_row(question: Question, answer: Any, points: float, most: float) -> str:
    width = 0 if abs(points) < _LEAST else 50 * abs(points) / most
    side = "up" if points > 0 else "down"
    text = "0.0" if abs(points) < _LEAST else f"{points:+.1f}".replace("-", "−")
    bar = f'<div class="signed" aria-hidden="true"><div class="{side}" style="width:{width:.1f}%"></div></div>'
    said = f'{escape(question.text)} <span class="said">{escape(question.words(answer))}</span>'
    return f'<tr><th scope="row">{said}{bar}</th><td>{text}</td></tr>'
