import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from dualrefnet.analysis.embedding import embed
from dualrefnet.analysis.opened_run import OpenedRun, open_run, sample_rows
from dualrefnet.analysis.perturbations import predict_with_metadata
from dualrefnet.analysis.shap import explain_metadata
from dualrefnet.data.synthetic import make_synthetic
from dualrefnet.errors import DataError, RunError
from dualrefnet.files import read_json, write_json
from dualrefnet.run import Run


def exact_shares(counts: np.ndarray, at_most: int) -> np.ndarray:
    """Return the rows of each class as fractions: a class gets one at least, the others share what is left in
    proportion.
    """
    for kept in range(len(counts), 0, -1):
        # The smallest classes are those that get their one row.
        large = np.argsort(-counts, kind="stable")[:kept]
        left = at_most - (len(counts) - kept)
        shares = np.ones(len(counts))
        shares[large] = left * counts[large] / counts[large].sum()
        if shares[large].min() >= 1 - 1e-12:
            return shares
    raise AssertionError("there are fewer rows than classes")


@given(st.lists(st.integers(1, 300), min_size=1, max_size=8), st.data())
@example([9300, 100, 100, 100, 100, 100, 100, 100], None)
@example([2, 2], None)
def test_a_sample_has_its_size_and_every_class_in_proportion(counts: list[int], data: st.DataObject | None) -> None:
    number, amounts = sum(counts), np.array(counts)
    size = data.draw(st.integers(len(counts), number + 2)) if data else min(100, number - 1)
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(len(counts)), counts))
    chosen = sample_rows(labels, size, seed=0)
    assert len(chosen) == min(size, number)
    assert (np.diff(chosen) > 0).all(), "sorted, none twice"
    assert chosen.min() >= 0
    assert chosen.max() < number
    found = np.bincount(labels[chosen], minlength=len(counts))
    if size >= number:
        assert (found == amounts).all()
        return
    assert found.min() >= 1
    # A share, rounded up or down.
    assert (np.abs(found - exact_shares(amounts, size)) < 1).all()
    # The larger class never gets fewer.
    order = np.argsort(amounts, kind="stable")
    assert (np.diff(found[order])[np.diff(amounts[order]) > 0] >= 0).all()


def test_one_of_each_is_the_smallest_sample_and_fewer_are_refused() -> None:
    labels = np.array(["a", "b", "b", "b", "c"])
    assert sorted(labels[sample_rows(labels, 3, 0)]) == ["a", "b", "c"]
    with pytest.raises(ValueError, match="2 rows can't show 3 classes"):
        sample_rows(labels, 2, 0)
    assert sample_rows(labels, 5, 0).tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_examples_and_rows_of_a_split_are_in_one_order(opened: OpenedRun, split: str) -> None:
    ids = opened.run.split.loc[opened.run.split["split"] == split, "image_id"].tolist()
    rows = opened.rows(split)
    assert rows["image_id"].tolist() == ids
    for examples in (opened.examples(split), opened.image_examples(split)):
        assert list(examples.image_ids) == ids
        assert [opened.classes[label] for label in examples.labels] == rows["label"].tolist()
        assert (examples.metadata == opened.metadata.encode(rows).values).all()
    assert [opened.groups[image_id] for image_id in ids] == rows["patient_id"].tolist()


@torch.inference_mode()
def test_what_was_opened_predicts_what_the_run_predicted(opened: OpenedRun) -> None:
    assert not opened.model.training
    examples = opened.examples("test")
    batch = examples.batch(np.arange(len(examples)))
    images = opened.images(batch)
    assert images is not None
    assert opened.store is not None
    # Normalised as its encoder expects.
    pixels = opened.store.read(opened.store.rows_of(list(examples.image_ids))).astype(np.float32) / 255
    mean, std = (np.array(values, np.float32) for values in opened.normalisation)
    np.testing.assert_allclose(images.permute(0, 2, 3, 1), (pixels - mean) / std, atol=1e-5)
    written = opened.run.predictions.query("split == 'test'")[[f"prob_{name}" for name in opened.classes]]
    for inputs in (images, opened.encode(batch)):
        probabilities = opened.model(inputs, batch.metadata).logits.double().softmax(dim=1)
        np.testing.assert_allclose(probabilities, written, atol=1e-5)


@torch.inference_mode()
def test_an_image_is_encoded_once_whoever_looks_at_it(tiny_run: Run) -> None:
    opened, images = open_run(tiny_run), 0

    def count(_: torch.nn.Module, given: tuple[torch.Tensor]) -> None:
        nonlocal images
        images += len(given[0])

    opened.model.encoder.last_map.register_forward_pre_hook(count)
    examples = opened.examples("test")
    for by in ("field", "column"):
        explain_metadata(opened, images=8, background=4, by=by, permutations=1)
    embed(opened, samples=20)
    first, _ = predict_with_metadata(opened, examples, [examples.metadata])
    assert images == opened.model.views * len(examples)
    written = opened.run.predictions.query("split == 'test'")[[f"prob_{name}" for name in opened.classes]]
    np.testing.assert_allclose(first[0], written, atol=1e-5)
    found = opened.vectors(examples, np.arange(len(examples)))
    batch = examples.batch(np.arange(len(examples)))
    np.testing.assert_allclose(found, opened.encode(batch).first.vector, atol=1e-4)


@pytest.fixture
def copied(tiny_run: Run, tmp_path: Path) -> Callable[[], Run]:
    return lambda: Run(Path(shutil.copytree(tiny_run.path, tmp_path / "copied")))


def test_data_without_the_runs_images_are_refused(tiny_run: Run, tmp_path: Path) -> None:
    other = make_synthetic(tmp_path / "other", images=60, seed=9, side=64)
    with pytest.raises(
        RunError, match=r"\d+ images of .*split\.csv are not in .*other; give the right folder with --root"
    ):
        open_run(tiny_run, other)
    with pytest.raises(DataError, match="nowhere"):
        open_run(tiny_run, tmp_path / "nowhere")


def test_a_run_without_a_model_is_refused(copied: Callable[[], Run]) -> None:
    run = copied()
    run.weights_file.unlink()
    with pytest.raises(RunError, match=r"there is no .*model\.safetensors"):
        open_run(run)
    (run.path / "model.json").unlink()
    with pytest.raises(RunError, match=r"has no model\.json"):
        open_run(run)


def test_data_whose_classes_have_changed_are_refused(opened: OpenedRun, copied: Callable[[], Run]) -> None:
    run = copied()
    description = read_json(run.path / "model.json")
    write_json(run.path / "model.json", {**description, "classes": description["classes"][::-1]})
    # Every output would be called by another class's name.
    with pytest.raises(RunError, match=r"knows the classes SEK, .*, ACK, but the data in .* have ACK, .*--root"):
        open_run(run)


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"recipe\.yaml"):
        open_run(Run(tmp_path))
