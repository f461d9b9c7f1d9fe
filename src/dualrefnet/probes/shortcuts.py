"""How much of the score is shortcut? One trained run, asked about its test side with parts of the input taken away or exchanged.

What is left of the score without the lesion, without the photograph, or with nothing but the pattern of missing answers, did not
come from the lesion. An exchange takes an input's meaning but leaves it an input that looks like those of training; taking it
away may give the model something that it never saw. Both are asked where there are both, and beside them stands what a model
reaches that was trained for that input alone.

Shares of the lead over chance don't add up to one: inputs that tell the same can each do without the other.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from dualrefnet.data.loader import Examples
from dualrefnet.errors import DataError
from dualrefnet.evaluation.changed_inputs import Asked, Floats, Forms, ask_with_forms, ask_without_photograph, strangers, without_answers
from dualrefnet.evaluation.opened_run import OpenedRun, sample_rows
from dualrefnet.probes.changed_forms import count_flags, find_gaps, hide_flags, replace_answers
from dualrefnet.probes.changed_pictures import ask_about_changed, read_outlines
from dualrefnet.probes.lead import measure_probes
from dualrefnet.probes.trained_for import train_for, with_gaps_told
from dualrefnet.progress import progress_bar

WHOLE, WHOLE_OUTLINED = "whole", "whole_outlined"
# Probe -> what the model is given, and what was trained for that input. `{unit}` is a patient, or a lesion.
PROBES = {
    WHOLE: ("everything, as it is", ""),
    "no_photograph": ("form, no photograph", "trained_form"),
    "other_photographs": ("form, photographs of other {unit}s", "trained_form"),
    "no_form": ("photograph, no answers", "trained_photograph"),
    "other_forms": ("photograph, forms of other {unit}s", "trained_photograph"),
    "gaps": ("only which answers are missing", "trained_gaps"),
    "photograph_and_gaps": ("photograph, and which answers are missing", ""),
    "flags_hidden": ("everything, flags say nothing is missing", ""),
    WHOLE_OUTLINED: ("everything, photographs with an outline", ""),
    "lesion_blurred": ("everything, lesion blurred away", ""),
    "background_only": ("everything, lesion filled with skin colour", ""),
    "lesion_only": ("everything, all but the lesion filled", ""),
    "background_alone": ("photograph with the lesion filled, forms of other {unit}s", ""),
    "lesion_alone": ("photograph with all but the lesion filled, forms of other {unit}s", ""),
}
# A change of the picture, asked with forms of others -> probe.
ALONE = {"background_only": "background_alone", "lesion_only": "lesion_alone"}
TRAINED = {
    "trained_form": "regression on the form",
    "trained_photograph": "regression on what the encoder sees",
    "trained_gaps": "regression on which answers are missing",
}


@dataclass(frozen=True)
class Shortcuts:
    """What a run's score leans on.

    Attributes:
        table: one row a probe and measure: probe, input (in words), trained (True for the references trained for that input),
            trained_probe (their name), compared_with; measure, chance, value, low, high; difference, difference_low, difference_high
            from `compared_with` on the same images and resamples; lead, lead_low, lead_high, the share of its lead over chance that
            is left (NaN where that has no lead that can be told from none); images, patients, repeats (of which the value is the mean).
        remarks: what was left out and what must be known, one sentence each.
        title: the method.
        unit: what was resampled and exchanged, `patient` or `lesion`.
        permutations: exchanges of which the mean is taken.
        train_images: photographs of the training side that the regression on vectors was fitted on.
        samples: of the bootstrap.
        seed: of exchanges and bootstrap.
    """

    table: pd.DataFrame
    remarks: tuple[str, ...]
    title: str
    unit: str
    permutations: int
    train_images: int
    samples: int
    seed: int


def probe_shortcuts(
    opened: OpenedRun, masks: Path | None = None, permutations: int = 10, samples: int = 1000, seed: int = 0, train_images: int = 2000
) -> Shortcuts:
    """Ask a trained run about its test side with changed inputs.

    Args:
        opened: the run.
        masks: folder of outlines `<image id>.png`; None: `masks` in the data set's folder, if it is there.
        permutations: how often inputs are exchanged between patients; the mean is reported.
        samples: bootstrap samples, drawn over patients.
        seed: of exchanges, choice of training images and bootstrap.
        train_images: at most so many photographs of the training side are read, each class in proportion.

    Raises:
        ValueError: `permutations` or `samples` is below 1, `train_images` is below the number of classes.
        DataError: `masks` isn't there or has none of the test images.
        ImageError: a mask can't be read.
    """
    if permutations < 1:
        raise ValueError(f"permutations must be at least 1, not {permutations}")
    probe = _Probe(opened, opened.pictures("test"), seed, permutations)
    masked = opened.masks(masks) if opened.model.reads_image else {}
    asked = probe.ask_forms()
    read = probe.train_references(asked, train_images)
    labels = probe.examples.labels
    measured = [measure_probes(opened, labels, probe.groups, probe.answers, WHOLE, samples, seed)]
    if opened.model.reads_image:
        places, changed = probe.ask_outlined(masked)
        if changed:
            measured.append(measure_probes(opened, labels[places], probe.groups[places], changed, WHOLE_OUTLINED, samples, seed))
    unit = opened.dataset.schema.unit
    table = pd.concat(measured, ignore_index=True)
    table.insert(1, "input", [PROBES[name][0].format(unit=unit) if name in PROBES else TRAINED[name] for name in table["probe"]])
    table.insert(2, "trained", table["probe"].isin(list(TRAINED)))
    references = [PROBES[name][1] if name in PROBES else "" for name in table["probe"]]
    if not (opened.model.reads_image and opened.reads_metadata):
        # What the run reads alone is its whole input.
        own = "trained_photograph" if opened.model.reads_image else "trained_form"
        references = [own if probe == WHOLE else name for probe, name in zip(table["probe"], references, strict=True)]
    table.insert(3, "trained_probe", [name if name in probe.answers else "" for name in references])
    return Shortcuts(table, tuple(probe.remarks), opened.model.title, unit, permutations, read, samples, seed)


class _Probe:
    """Asks a run, and gathers answers and remarks.

    Attributes:
        examples: the test side, with its pictures.
        groups: (N,) patients.
        answers: probe -> one (N, C) array of probabilities a repeat.
        remarks: what was left out.
    """

    def __init__(self, opened: OpenedRun, examples: Examples, seed: int, permutations: int) -> None:
        self.opened, self.examples, self.permutations, self.seed = opened, examples, permutations, seed
        self.rows = opened.rows("test")
        self.groups = opened.groups.loc[list(examples.image_ids)].to_numpy(dtype=object)
        self.answers: dict[str, list[Floats]] = {}
        self.remarks: list[str] = []
        self.gappy = False

    def ask_forms(self) -> Asked:
        """Ask with the photographs as they are, and without: with forms that are whole, changed, exchanged or empty."""
        opened, own = self.opened, self.examples.metadata
        both = opened.model.reads_image and opened.reads_metadata
        beside: dict[str, list[Forms]] = {WHOLE: [own]}
        alone: dict[str, list[Forms]] = {}
        given: list[NDArray[np.int64]] = []
        if both:
            given = self._exchanges(self.groups, 1)
            beside |= {"other_forms": [own[order] for order in given], "no_form": [self._empty()]}
            alone["no_photograph"] = [own]
        elif opened.model.reads_image:
            self.remarks.append("the run reads no form: probes of the form were left out")
        else:
            self.remarks.append("the run reads no photograph: probes of the photograph were left out")
        if opened.reads_metadata:
            self._add_gaps(beside, alone)
        with progress_bar("asking with changed forms") as show:
            asked = ask_with_forms(opened, self.examples, [form for forms in beside.values() for form in forms], show)
        remaining = iter(asked.answers)
        found = {name: [next(remaining) for _ in forms] for name, forms in beside.items()}
        # The photograph of one beside the form of another is a question about either of the two.
        found["other_photographs"] = [_placed(answer, order) for answer, order in zip(found.get("other_forms", []), given, strict=True)]
        for name, forms in alone.items():
            found[name] = ask_without_photograph(opened, forms) if opened.model.reads_image else found[name]
        self.answers |= {name: found[name] for name in PROBES if found.get(name)}
        return asked

    def ask_outlined(self, masks: dict[str, Path]) -> tuple[NDArray[np.int64], dict[str, list[Floats]]]:
        """Ask with pictures from which the lesion, or all but the lesion, was taken.

        Returns:
            The places (P,) of the examples that have an outline, and their answers by probe; none if there are too few.
        """
        outlines = read_outlines(self.opened, self.examples, masks)
        places = outlines.places
        if outlines.left_out:
            self.remarks.append(f"{outlines.left_out} outlines mark nothing, or the whole picture, and were left out")
        if len(np.unique(self.groups[places])) < 2:
            self.remarks.append("there are no outlines of lesions, so the lesion could not be taken out of the photographs")
            return places, {}
        own = self.examples.metadata[places]
        others = self._exchanges(self.groups[places], 3) if self.opened.reads_metadata else []
        with progress_bar("pictures without the lesion") as show:
            changed = ask_about_changed(self.opened, self.examples, outlines, [own, *(own[order] for order in others)], show)
        answers = {WHOLE_OUTLINED: [self.answers[WHOLE][0][places]]} | {name: found[:1] for name, found in changed.items()}
        if others:
            answers |= {ALONE[name]: found[1:] for name, found in changed.items() if name in ALONE}
        return places, answers

    def train_references(self, asked: Asked, train_images: int) -> int:
        """Fit the regressions on the training side, and return how many photographs were read for that."""
        opened, train = self.opened, self.opened.pictures("train")
        classes, read = len(opened.classes), 0
        if opened.reads_metadata:
            forms = with_gaps_told(train.metadata, self.examples.metadata)
            self.answers["trained_form"] = [train_for(forms[0], train.labels, forms[1], classes)]
        if self.gappy:
            gaps = [np.concatenate(find_gaps(opened.rows(side), opened.metadata), axis=1).astype(np.float32) for side in ("train", "test")]
            self.answers["trained_gaps"] = [train_for(gaps[0], train.labels, gaps[1], classes)]
        if opened.model.reads_image:
            places = sample_rows(train.labels, train_images, self.seed)
            with progress_bar("photographs of the training side") as show:
                vectors = opened.vectors(train, places, show)
            self.answers["trained_photograph"] = [train_for(vectors, train.labels[places], asked.vectors, classes)]
            read = len(places)
            self.remarks.append(
                f"what the encoder sees was learned on the same {read} training photographs that its regression was fitted on, "
                "so the regression may trust it too much"
            )
        return read

    def _add_gaps(self, beside: dict[str, list[Forms]], alone: dict[str, list[Forms]]) -> None:
        """Add the forms of which only the gaps are true, and those whose flags are hidden."""
        metadata = self.opened.metadata
        missing, not_known = find_gaps(self.rows, metadata)
        self.gappy = bool(missing.any() or not_known.any())
        if not self.gappy:
            self.remarks.append("no answer of the test side is missing: probes of what is missing were left out")
            return
        if not_known.any():
            self.remarks.append("an answer 'not known' counts as none: it stays where answers are replaced")
        generator = np.random.default_rng([self.seed, 2])
        replaced = [metadata.encode(replace_answers(self.rows, metadata, self.groups, generator)).values for _ in range(self.permutations)]
        if self.opened.model.reads_image:
            beside["photograph_and_gaps"] = alone["gaps"] = replaced
        else:
            beside["gaps"] = replaced
        if count_flags(metadata) and not np.isnan(self.examples.metadata).any():
            beside["flags_hidden"] = [hide_flags(metadata, self.examples.metadata)]
            if metadata.imputer is None:
                self.remarks.append("gaps hold 0 in this run, so they can be seen even where the flags are hidden")
        elif np.isnan(self.examples.metadata).any():
            self.remarks.append("the run has learned tokens for what is missing: there are no flags to hide")
        else:
            self.remarks.append(f"metadata tier {metadata.section.tier} has no flags for what is missing, so none could be hidden")

    def _exchanges(self, groups: NDArray[np.object_], stream: int) -> list[NDArray[np.int64]]:
        """Draw exchanges between patients; none, with a remark, if there can't be any."""
        generator = np.random.default_rng([self.seed, stream])
        try:
            return [strangers(groups, generator) for _ in range(self.permutations)]
        except DataError as error:
            self.remarks.append(str(error))
            return []

    def _empty(self) -> Forms:
        """Return the encoded forms (N, M) of which every answer is missing."""
        fields = [field.name for field in self.opened.metadata.fields]
        return self.opened.metadata.encode(without_answers(self.rows, fields)).values


def _placed(answer: Floats, order: NDArray[np.int64]) -> Floats:
    """Return answers in the order of the forms they were asked with: row i was asked with form `order[i]`."""
    result = np.empty_like(answer)
    result[order] = answer
    return result
