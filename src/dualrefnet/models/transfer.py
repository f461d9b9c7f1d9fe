"""Transfer: a model that starts from the parameters of another run, and the record of what these were trained on."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from dualrefnet.errors import RunError
from dualrefnet.files import sha256_of_file
from dualrefnet.models.base import Architecture, Method
from dualrefnet.models.encoders import Encoder, WeightsSource, fill_network, read_tensors, some
from dualrefnet.progress import note
from dualrefnet.recipe import ImageSection, Recipe, differences
from dualrefnet.run import Run


@dataclass(frozen=True)
class SourceRun:
    """The run that a model starts from. `sources`: what each of its encoders is then known to have been trained on."""

    path: Path
    sources: list[WeightsSource]
    tensors: dict[str, Tensor]

    @classmethod
    def open(cls, recipe: Recipe) -> SourceRun:
        """Open the run of `model.init_from`; RunError: there is none, or its encoders can't be those of the recipe."""
        path = Path(str(recipe.model.init_from)).expanduser()
        run = Run(path)
        if not (path / "recipe.yaml").is_file():
            kind = "is a bundle, and training goes on from a run" if (path / "bundle.json").is_file() else "isn't a run"
            raise RunError(f"model.init_from: {path} {kind}; name the folder that `dualrefnet train` wrote")
        if run.members:
            raise RunError(
                f"model.init_from: {path} is several models; name one of them, such as {run.members[0].path}"
            )
        if not run.weights_file.is_file() or not (run.finished or run.trained):
            raise RunError(
                f"model.init_from: {path} holds no trained model: its training isn't over, or its parameters were "
                "removed"
            )
        run.check_weights()
        about = run.model
        there, backbones = Architecture.model_validate(about["architecture"]).backbones, recipe.model.backbones
        # A method that reads no image records one source that isn't an encoder's.
        if len(about["weights"]) != len(there) or backbones != there or not _reads_image(run):
            had = "+".join(there) if _reads_image(run) else "no image encoder"
            raise RunError(
                f"model.init_from: {path} has {had}, and this recipe {'+'.join(backbones)}: "
                f"set model.backbone (model.members) to what it has, or start from another run"
            )
        # Another size or fit shows the same colours.
        changed = differences(ImageSection.model_validate(about["preprocessing"]["image"]), recipe.image)
        changed = [text for text in changed if not text.startswith(("size:", "fit:"))]
        if changed:
            raise RunError(
                f"model.init_from: {path} was trained on images that were normalised otherwise "
                f"(image.{', image.'.join(changed)}): set the same here, or start from another run"
            )
        dataset, sha256 = about["dataset"], sha256_of_file(run.weights_file)
        this = {"run": run.recipe.name, "dataset": dataset["title"], "licence": dataset["licence"]}
        this |= {"citation": dataset.get("citation", ""), "model_sha256": sha256}
        sources = []
        for record in about["weights"]:
            before = WeightsSource.from_json(record)
            said = f"{before.description}, then run {this['run']} on {this['dataset']}"
            trained_on = (*before.trained_on, this)
            sources.append(replace(before, kind="run", description=said, sha256=sha256, trained_on=trained_on))
        return cls(path, sources, read_tensors(run.weights_file))

    def fill(self, model: Method, parts: str) -> None:
        """Put the encoders' tensors into a model, and of `parts` all the others that fit by name and shape; say so."""
        state = model.state_dict()
        complaint = f"model.init_from: {self.path} doesn't fit (transformers are bound to their image.size)"
        taken = 0
        for position, encoder in enumerate(model.encoders):
            assert isinstance(encoder, Encoder)
            prefix = f"encoders.{position}.body."
            own = {name.removeprefix(prefix): value for name, value in self.tensors.items() if name.startswith(prefix)}
            fill_network(encoder.body, own, complaint)
            taken += len(own)
        others = {name: value for name, value in self.tensors.items() if not name.startswith("encoders.")}
        fitting = {
            name: value
            for name, value in others.items()
            if parts == "all" and name in state and state[name].shape == value.shape
        }
        model.load_state_dict(fitting, strict=False)
        left = sorted(others.keys() - fitting.keys())
        new = [name for name in state if name not in fitting and not name.startswith("encoders.")]
        rest = [f"left there: {some(left)}"] if left else []
        rest += [f"new here: {some(new)}"] if new else []
        note(
            f"starts from {self.path}: {taken + len(fitting)} of its {len(self.tensors)} tensors are taken, {taken} of "
            f"them the encoder's; {'; '.join(rest) or 'nothing is left'}"
        )


def _reads_image(run: Run) -> bool:
    from dualrefnet.models.registry import METHODS

    return METHODS[run.recipe.model.method].reads_image
