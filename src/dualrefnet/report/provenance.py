"""What a reader must know before believing a run's numbers, and how the run can be repeated."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import yaml

from dualrefnet.data.protocols import split_counts
from dualrefnet.display.format import Cell, PrintedTable
from dualrefnet.errors import RunError
from dualrefnet.models.base import Architecture
from dualrefnet.models.encoders import BACKBONES
from dualrefnet.models.registry import METHODS
from dualrefnet.run import Run

if TYPE_CHECKING:
    from dualrefnet.display.page import Section

# In these data sets a form has gaps because the lesion was not biopsied, and such lesions are benign.
GAPS_TELL_THE_CLASS = ("pad_ufes_20", "sample")

WORDS = (
    ("balanced accuracy", "the mean of the classes' sensitivities"),
    ("AUC", "the chance that a case of the class is ranked above one of another class; .5 is guessing, 1 is perfect"),
    ("AP", "average precision, the area under the precision-recall curve; guessing gives the share of the class"),
    ("F1", "the harmonic mean of PPV and sensitivity"),
    ("kappa", "agreement beyond chance; 0 is chance, 1 is perfect"),
    ("expected calibration error", "the mean distance between how sure the model is and how often it is right"),
    ("Brier score", "the mean squared distance between the probabilities and the truth; 0 is perfect, 2 the worst"),
    (
        "95% interval",
        "from resampling whole patients, so that several photographs of one patient don't feign certainty",
    ),
)


def run_title(run: Run) -> tuple[str, str]:
    """Return the title of a run's page and the line below it."""
    recipe, description = run.recipe, run.model
    method, architecture = METHODS[recipe.model.method], Architecture.model_validate(description["architecture"])
    backbones = (
        " + ".join(BACKBONES[name].title for name in architecture.backbones)
        if method.reads_image
        else "no image encoder"
    )
    metadata = "no metadata" if recipe.metadata.tier == "M0" else f"metadata {recipe.metadata.tier}"
    protocol = {
        "paper": "the paper's split",
        "grouped": "patients apart",
        "grouped-cv": f"patients apart, fold {recipe.data.fold}",
    }
    title = f"{method.title} on {description['dataset']['title']}"
    return (
        title,
        f"{backbones}, {metadata}; {protocol.get(recipe.data.protocol, recipe.data.protocol)}; seed {recipe.seed}",
    )


def run_names(first: Run, second: Run) -> tuple[str, str]:
    """Return the names of two runs for people: their methods, or if these are the same their folders.

    Raises:
        RunError: it is the same run.
    """
    if first.path.resolve() == second.path.resolve():
        raise RunError(f"{first.path} can't be compared with itself; name another run with --against")
    titles = [run_title(run)[0].split(" on ")[0] for run in (first, second)]
    if titles[0] != titles[1]:
        return titles[0], titles[1]
    folders = (first.path.resolve().name, second.path.resolve().name)
    return folders if folders[0] != folders[1] else (str(first.path), str(second.path))


def run_notes(run: Run) -> list[str]:
    """Return what a reader must know before believing a number, one sentence or two each."""
    recipe, metrics, weights = run.recipe, run.metrics, run.fingerprint["weights"]
    method = METHODS[recipe.model.method]
    notes = []
    if metrics["drawn"]:
        notes.append(
            "Drawn pictures of invented lesions, made by a program: the numbers say that the software works, and nothing about medicine."
        )
    for name, shares in metrics["leakage"].items():
        if shares and shares["train_or_val"]:
            notes.append(
                f"The split leaks: {shares['train']:.0%} of the test photographs show a {name} that training has seen "
                f"({shares['train_or_val']:.0%} with validation). The numbers are too good for new {name}s."
            )
    if all(shares is None for shares in metrics["leakage"].values()):
        notes.append(
            "The data set names neither patients nor lesions: whether one is on both sides of the split can't be seen."
        )
    if recipe.metadata.imputation == "label_leaking" and method.needs_metadata:
        notes.append(
            "The gaps of the metadata were filled with the help of the diagnosis: a demonstration of that leak, no result."
        )
    reads_gaps = recipe.metadata.tier in ("M2", "M3") and method.reads_metadata
    if recipe.data.dataset in GAPS_TELL_THE_CLASS and reads_gaps:
        notes.append(
            "In this data set forms have gaps where a lesion was not biopsied, and those lesions are benign: a part of the score can "
            "come from the gaps alone. A new patient's gaps mean something else."
        )
    if method.reads_image and any(source["kind"] == "none" for source in weights):
        notes.append("The image encoder started from random numbers, not from ImageNet.")
    if method.reads_image and recipe.training.encoder == "frozen":
        notes.append("The image encoder was frozen: it has learned nothing about skin.")
    if method.reconstruction:
        notes.append(f"{method.title} is a reconstruction: {method.reconstruction}.")
    # The remarks of the measures are sentences without a capital and a full stop.
    return notes + [f"{remark[0].upper()}{remark[1:]}." for remark in metrics["remarks"]]


def provenance_section(run: Run) -> Section:
    """Return how the run was made: data, split, code, hardware, weights and the whole recipe."""
    # Sections hold pictures, and so need matplotlib; titles and notes are also for those who don't have it.
    from dualrefnet.display.page import Section

    recipe, made = run.recipe, run.fingerprint
    description = run.model
    dataset = description["dataset"]
    rows = [
        (
            "data",
            f"{dataset['title']}, {made['data']['rows_used']:,} rows used; licence {dataset['licence'] or 'not stated'}",
        ),
        ("protocol", recipe.data.protocol),
        ("weights at the start", "; ".join(dict.fromkeys(source["description"] for source in made["weights"]))),
        (
            "software",
            f"dualrefnet {made['dualrefnet']}, commit {made['git_commit'] or 'not known (installed package)'}",
        ),
        ("libraries", ", ".join(f"{name} {version}" for name, version in made["packages"].items())),
        ("hardware", _hardware(made)),
        ("seed", str(made["seed"])),
        ("fingerprints", f"table {made['data']['table_sha256'][:16]}, split {made['data']['split_sha256'][:16]}"),
    ]
    facts = PrintedTable(
        "How this run was made", ("what", "value"), [[Cell(name), Cell(value)] for name, value in rows], left=2
    )
    counts = split_counts(run.split, tuple(description["classes"]))
    split = PrintedTable(
        "Photographs",
        ("class", *map(str, counts.columns)),
        [
            [Cell(str(name)), *(Cell(f"{value:,}") for value in values)]
            for name, *values in counts.itertuples(name=None)
        ],
    )
    words = PrintedTable("Words", ("word", "meaning"), [[Cell(word), Cell(meaning)] for word, meaning in WORDS], left=2)
    text = yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    lead = ["Save the recipe below as a file and give it to `dualrefnet train` to repeat the run."]
    return Section("made", "How this was made, and what the words mean", lead, [facts, split, words], text, folded=True)


def _hardware(made: dict[str, Any]) -> str:
    hardware = made["hardware"]
    machine = f"{hardware['gpu'] or hardware['cpu'] or hardware['machine']}, {hardware['cores']} cores, {hardware['memory_gib']} GiB"
    return f"{machine}; {made['precision']}, {made['processes']} process{'es' if made['processes'] > 1 else ''}"
