"""The page's form: one question for each field that the model reads, and the answers read back."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dualrefnet.errors import DataError
from dualrefnet.page.quiet_gradio import gradio

if TYPE_CHECKING:
    from dualrefnet.deploy.predictor import Predictor

UNKNOWN = "unknown"
_YES_NO = {"yes": True, "no": False}
# Questions at the top.
FIRST = 8
# More choices than these go into a list that unfolds.
_MOST_BUTTONS = 4
# Numbers and categories first: a row of yes-or-no questions reads faster when nothing else stands between them.
_ORDER = {"numeric": 0, "categorical": 1, "boolean": 2}


@dataclass(frozen=True)
class Question:
    """One question as people see it.

    Attributes:
        name: the model's field.
        kind: numeric, categorical or boolean.
        text: the question in plain words.
        first: stands at the top: one of the fields that change the answer most, or, where that wasn't measured, that
            are always recorded.
        choices: words and value of each answer, "unknown" first; empty for a number.
        minimum: smallest believable number.
        maximum: largest believable number.
        unit: of the number.
    """

    name: str
    kind: str
    text: str
    first: bool
    choices: tuple[tuple[str, str], ...] = ()
    minimum: float | None = None
    maximum: float | None = None
    unit: str | None = None

    @property
    def label(self) -> str:
        """The question with its unit."""
        return f"{self.text} ({self.unit})" if self.unit else self.text

    @property
    def hint(self) -> str | None:
        """What a number may be; None for choices, which say it themselves."""
        if self.kind != "numeric":
            return None
        return f"{self.range}; empty: {UNKNOWN}" if self.range else f"Empty: {UNKNOWN}"

    @property
    def range(self) -> str:
        """The believable numbers in words; empty if there is no limit."""
        if self.minimum is not None and self.maximum is not None:
            return f"{self.minimum:g} to {self.maximum:g}"
        if self.minimum is not None:
            return f"At least {self.minimum:g}"
        return "" if self.maximum is None else f"At most {self.maximum:g}"

    def words(self, answer: Any) -> str:
        """Return an answer of the form as people read it."""
        if self.kind == "boolean":
            return "yes" if answer in (True, "True", "yes") else "no"
        if self.kind == "numeric":
            return f"{answer:g} {self.unit or ''}".strip()
        return {value: words for words, value in self.choices}.get(str(answer), str(answer))


def make_questions(predictor: Predictor) -> tuple[Question, ...]:
    """Return the questions of a model: those that change its answer most first, then by kind, then in the schema's
    order.
    """
    questions = []
    effects = predictor.decision.field_effects if predictor.decision is not None else {}
    deciding = sorted(effects, key=lambda name: -effects[name])[:FIRST]
    for field in predictor.fields:
        choices: tuple[tuple[str, str], ...] = ()
        if field.kind == "boolean":
            choices = ((UNKNOWN, ""), ("yes", "yes"), ("no", "no"))
        elif field.kind == "categorical":
            # "Asked, and not known" is what leaving it at unknown says.
            levels = [level for level in predictor.categories(field.name) if level not in field.missing_codes]
            choices = ((UNKNOWN, ""), *((_in_words(level), level) for level in levels))
        text = field.description or _in_words(field.name)
        first = field.name in deciding if deciding else field.tier == "M1"
        questions.append(
            Question(field.name, field.kind, text, first, choices, field.minimum, field.maximum, field.unit)
        )
    return tuple(sorted(questions, key=lambda question: (not question.first, _ORDER[question.kind])))


def make_component(question: Question) -> gradio.components.Component:
    """Make what asks a question; it stands at "unknown"."""
    identity = f"question-{question.name}"
    if question.kind == "numeric":
        # Gradio's own field of numbers shows an empty one as 0, and an age of 0 isn't an unknown age.
        return gradio.Textbox(
            label=question.label, info=question.hint, value="", max_lines=1, elem_id=identity, elem_classes="number"
        )
    if len(question.choices) <= _MOST_BUTTONS:
        return gradio.Radio(
            list(question.choices), value="", label=question.label, elem_id=identity, elem_classes="choice"
        )
    return gradio.Dropdown(
        list(question.choices), value="", label=question.label, elem_id=identity, elem_classes="list", filterable=False
    )


def read_form(questions: Sequence[Question], values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the answers that were given; what stands at "unknown" isn't among them.

    Args:
        questions: of the model.
        values: what the browser sent, by field. It may be anything.

    Raises:
        DataError: a value isn't one of the choices, or no number within its range; no value stands in the message.
    """
    form: dict[str, Any] = {}
    for question in questions:
        value = values.get(question.name)
        if value is None or value == "":
            continue
        if question.kind == "numeric":
            form[question.name] = _number(question, value)
        elif not isinstance(value, str) or value not in [known for _, known in question.choices]:
            raise DataError(f"“{question.text}” has an answer that isn't one of its choices; choose another")
        else:
            form[question.name] = _YES_NO[value] if question.kind == "boolean" else value
    return form


def fitting(questions: Sequence[Question], answers: Mapping[str, Any]) -> dict[str, Any]:
    """Return those of some answers that the questions can take, as the components hold them."""
    values: dict[str, Any] = {}
    for question in questions:
        answer = answers.get(question.name)
        if question.kind == "numeric" and isinstance(answer, int | float):
            values[question.name] = f"{answer:g}"
        elif question.kind == "boolean" and isinstance(answer, bool):
            values[question.name] = "yes" if answer else "no"
        elif question.kind == "categorical":
            known = {value.lower(): value for _, value in question.choices if value}
            if str(answer).lower() in known:
                values[question.name] = known[str(answer).lower()]
    return values


def _number(question: Question, value: object) -> float:
    number = math.nan
    # Python reads True as 1, and 1_000 as a thousand; nobody means that.
    if isinstance(value, int | float | str) and not isinstance(value, bool) and "_" not in str(value):
        # Half of the world writes 6,5.
        with suppress(ValueError, OverflowError):
            number = float(value.replace(",", ".") if isinstance(value, str) else value)
    if not math.isfinite(number):
        raise DataError(f"“{question.text}” must be a number")
    low, high = question.minimum, question.maximum
    if (low is not None and number < low) or (high is not None and number > high):
        unit = f" {question.unit}" if question.unit else ""
        raise DataError(f"“{question.text}” must be {question.range.lower()}{unit}")
    return number


def _in_words(level: str) -> str:
    """Spell a level or a name for people: FACE -> Face, lower_leg -> Lower leg."""
    words = level.replace("_", " ").strip()
    return words[:1].upper() + (words[1:].lower() if words.isupper() else words[1:])
