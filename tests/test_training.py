import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import dualrefnet
from dualrefnet.analysis.evaluate import evaluate_run
from dualrefnet.data.loader import Batch
from dualrefnet.errors import RecipeError, RunError, SplitError, WeightsError
from dualrefnet.files import write_json, write_tensors, write_yaml
from dualrefnet.models.base import Method
from dualrefnet.models.encoders import create_encoder
from dualrefnet.models.registry import new_model
from dualrefnet.recipe import Recipe, load_recipe
from dualrefnet.run import Run, new_folder, run_lock, start_run
from dualrefnet.training.loop import Trainer, create_optimizer, load_checkpoint, save_checkpoint
from dualrefnet.training.train import enough_memory, train_recipe

FILES = {
    "recipe.yaml",
    "split.csv",
    "model.safetensors",
    "model.json",
    "history.csv",
    "predictions.csv",
    "calibration.json",
    "out_of_scope.safetensors",
    "metrics.json",
    "fingerprint.json",
}


def same_parameters(a: Run, b: Run) -> bool:
    first, second = load_file(a.weights_file), load_file(b.weights_file)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_a_run_leaves_the_contracted_files_and_nothing_else(tiny_run: Run) -> None:
    assert {path.name for path in tiny_run.path.iterdir()} == FILES
    history = tiny_run.history
    assert list(history["epoch"]) == [1, 2]
    assert {
        "train_classification",
        "train_reconstruction",
        "train_penalty",
        "val_balanced_accuracy",
        "l1_hidden",
    } <= set(history.columns)
    assert history["val_psnr"].between(0, 60).all()
    assert history["val_ssim"].between(-1, 1).all()
    fingerprint = (tiny_run.path / "fingerprint.json").read_text()
    assert '"seed": 0' in fingerprint
    assert "random, not pretrained" in fingerprint


def contents(run: Run) -> dict[str, bytes | str]:
    """What each file of a run holds, without the seconds that an epoch took."""
    files = {path.name: path.read_bytes() for path in run.path.iterdir()}
    return {**files, "history.csv": run.history.drop(columns="seconds").to_csv()}


def test_the_same_seed_gives_the_same_files_and_another_seed_others(
    tiny_run: Run, tiny_recipe: Recipe, tmp_path: Path
) -> None:
    # A store of its own, filled by another number of threads.
    again = train_recipe(tiny_recipe, tmp_path / "again", cache=tmp_path / "cache", workers=3)
    assert contents(again) == contents(tiny_run)
    other = train_recipe(load_recipe(tiny_recipe, {"seed": 1, "training.epochs": 1}), tmp_path / "other")
    assert not same_parameters(tiny_run, other)


def test_a_run_that_stops_after_an_epoch_resumes_to_the_same_result(
    tiny_run: Run, tiny_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = iter(range(10_000))
    whole = Trainer._step
    per_epoch = len(tiny_run.split.query("split == 'train'")) // tiny_recipe.training.batch_size

    def dies_in_the_second_epoch(self, *args):
        if next(steps) == per_epoch + 1:
            raise KeyboardInterrupt
        return whole(self, *args)

    monkeypatch.setattr(Trainer, "_step", dies_in_the_second_epoch)
    with pytest.raises(KeyboardInterrupt):
        train_recipe(tiny_recipe, tmp_path / "run")
    monkeypatch.setattr(Trainer, "_step", whole)
    assert not Run(tmp_path / "run").finished
    with pytest.raises(RunError, match="--resume"):
        train_recipe(tiny_recipe, tmp_path / "run")
    with pytest.raises(RunError, match=r"seed: 0 there, 5 now"):
        train_recipe(load_recipe(tiny_recipe, {"seed": 5}), tmp_path / "run", resume=True)
    resumed = train_recipe(tiny_recipe, tmp_path / "run", resume=True)
    assert contents(resumed) == contents(tiny_run)
    finished = resumed.weights_file.stat().st_mtime_ns
    train_recipe(tiny_recipe, tmp_path / "run", resume=True)
    assert resumed.weights_file.stat().st_mtime_ns == finished


def command(*arguments: str, launcher: tuple[str, ...] = ("-m", "dualrefnet")) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(
        [sys.executable, *launcher, *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.fixture
def recipe_file(tiny_recipe: Recipe, tmp_path: Path) -> str:
    values = load_recipe(tiny_recipe, {"training.epochs": 4}).model_dump(mode="json")
    write_yaml(tmp_path / "recipe.yaml", values)
    return str(tmp_path / "recipe.yaml")


@pytest.mark.slow
def test_kill_9_at_any_moment_and_resume_gives_the_same_result(recipe_file: str, tmp_path: Path) -> None:
    undisturbed = command("train", recipe_file, "--out", str(tmp_path / "undisturbed"))
    assert undisturbed.wait() == 0, undisturbed.stdout.read()
    folder = tmp_path / "killed"
    for delay in (0.0, 1.5, 4.0):
        process = command("train", recipe_file, "--out", str(folder), "--resume")
        deadline = time.monotonic() + 120
        while (
            not (folder / "checkpoint.safetensors").exists() and process.poll() is None and time.monotonic() < deadline
        ):
            time.sleep(0.05)
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        process.wait()
    last = command("train", recipe_file, "--out", str(folder), "--resume")
    assert last.wait() == 0, last.stdout.read()
    assert same_parameters(Run(folder), Run(tmp_path / "undisturbed"))
    assert {path.name for path in folder.iterdir()} == FILES


def two_processes() -> tuple[str, ...]:
    """Return what starts a command in two processes of this machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    # accelerate's --cpu starts several processes through MPI only; --multi_gpu starts them itself, and on CPUs they use
    # gloo.
    options = "--multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no"
    return "-m", "accelerate.commands.launch", *options.split(), "--main_process_port", port, "-m", "dualrefnet"


@pytest.mark.slow
def test_two_processes_train_one_model(recipe_file: str, tmp_path: Path) -> None:
    process = command("train", recipe_file, "--out", str(tmp_path / "run"), launcher=two_processes())
    output, _ = process.communicate(timeout=500)
    assert process.returncode == 0, output
    run = Run(tmp_path / "run")
    assert run.finished
    assert '"processes": 2' in (run.path / "fingerprint.json").read_text()
    assert len(run.predictions) == len(run.split.query("split != 'train'"))
    assert output.count("epoch   1/4") == 1, "only the main process may speak"


@pytest.mark.slow
def test_two_processes_have_the_losses_of_one(recipe_file: str, tmp_path: Path) -> None:
    # Without batch normalisation, whose statistics are of a process's share, and without dropout.
    changes = ("model.method=metadata_only", "model.dropout=0", "training.batch_size=16", "evaluation.bootstrap=0")
    histories = []
    for name, launcher in (("one", None), ("two", two_processes())):
        chosen = {} if launcher is None else {"launcher": launcher}
        process = command("train", recipe_file, *changes, "--out", str(tmp_path / name), **chosen)
        output, _ = process.communicate(timeout=500)
        assert process.returncode == 0, output
        histories.append(Run(tmp_path / name).history[["train_total", "val_loss"]])
    np.testing.assert_allclose(*histories, rtol=1e-4)
    assert histories[0]["train_total"].nunique() == len(histories[0])


@pytest.mark.parametrize("reduction", ["weights", "batch", "sum"])
def test_a_batch_in_parts_takes_the_step_of_the_whole(reduction: str, tmp_path: Path) -> None:
    found = []
    for parts in (1, 4):
        changes = {"model.method": "metadata_only", "model.dropout": 0, "training.accumulate": parts}
        changes["training.precision"] = "fp32"
        recipe = load_recipe({"name": "x"}, {**changes, "loss.classification_reduction": reduction})
        torch.manual_seed(0)
        model = new_model(recipe, 4, 3)[0]
        trainer = Trainer(model, recipe, Run(tmp_path), torch.ones(3), ((0.0,) * 3, (1.0,) * 3))
        trainer.optimizer = torch.optim.SGD(model.parameters(), 0.1)
        generator = torch.Generator().manual_seed(1)
        batch = Batch(np.arange(8), None, torch.randn(8, 4, generator=generator), torch.arange(8) % 3)
        terms = trainer._step(trainer.views, batch, None)
        found.append((terms, [parameter.detach().clone() for parameter in model.parameters()]))
    (whole, first), (parts, second) = found
    for name, value in whole.items():
        torch.testing.assert_close(parts[name], value, rtol=1e-4, atol=1e-6)
    for one, other in zip(first, second, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-4, atol=2e-5)


PROGRESS = {"epoch": 3, "history": [], "best": [0.5, -1.0], "stale": 0, "norms": {}, "schedule": None}


def model_and_optimizer(width: int = 4) -> tuple[Method, torch.optim.Optimizer]:
    recipe = load_recipe({"name": "x"}, {"model.method": "metadata_only"})
    model = new_model(recipe, width, 3)[0]
    return model, create_optimizer(model, recipe.training)


def take_step(model: Method, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    model(None, torch.randn(8, 4)).logits.square().sum().backward()
    optimizer.step()


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    model, optimizer = model_and_optimizer()
    take_step(model, optimizer)
    save_checkpoint(tmp_path / "c.safetensors", model, optimizer, PROGRESS)
    return tmp_path / "c.safetensors"


def test_a_checkpoint_holds_the_whole_state_without_pickle(checkpoint: Path) -> None:
    pairs = [model_and_optimizer() for _ in range(2)]
    for pair in pairs:
        assert load_checkpoint(checkpoint, *pair) == PROGRESS
        torch.manual_seed(3)
        take_step(*pair)
    assert all(torch.equal(a, b) for a, b in zip(*(model.parameters() for model, _ in pairs), strict=True))
    assert not torch.equal(load_file(checkpoint)["model/head.hidden.weight"], pairs[0][0].head.hidden.weight)


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: content[: len(content) // 2],
        lambda content: (2**40).to_bytes(8, "little") + content[8:],
        lambda content: content.replace(b"model/head", b"model/tail"),
        lambda content: content.replace(b"exp_avg_sq", b"exp_avg/sq"),
        lambda content: content.replace(b"history", b"futures"),
        lambda content: content.replace(b'"F32"', b'"I32"'),
    ],
    ids=["empty", "truncated", "header", "names", "slots", "progress", "type"],
)
def test_a_damaged_checkpoint_says_what_to_do(checkpoint: Path, damage: Callable[[bytes], bytes]) -> None:
    checkpoint.write_bytes(damage(checkpoint.read_bytes()))
    with pytest.raises(RunError, match="delete it to train from the beginning"):
        load_checkpoint(checkpoint, *model_and_optimizer())


def test_a_checkpoint_of_another_model_says_what_to_do(checkpoint: Path) -> None:
    with pytest.raises(RunError, match="delete it to train from the beginning"):
        load_checkpoint(checkpoint, *model_and_optimizer(width=5))


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("could not create a primitive"),
        RuntimeError("can't start new thread"),
    ],
)
def test_a_limit_of_the_machine_says_what_to_set(error: Exception) -> None:
    with pytest.raises(RunError, match="lower"), enough_memory():
        raise error


def test_an_allocation_that_fails_says_what_to_set_and_other_errors_stay() -> None:
    with pytest.raises(RunError, match=r"lower training\.batch_size"), enough_memory():
        torch.empty(2**58)
    with pytest.raises(RuntimeError, match="shape"), enough_memory():
        torch.zeros(2).view(3)


def test_a_strong_penalty_collapses_a_real_run_and_the_run_says_so(tiny_recipe: Recipe, tmp_path: Path, capsys) -> None:
    recipe = load_recipe(
        tiny_recipe,
        {
            "model.method": "metadata_only",
            "loss.frequency": "balanced",
            "loss.penalty_strength": 0.3,
            "training.optimizer": "sgd",
            "training.learning_rate": 0.01,
            "training.schedule": "constant",
            "training.epochs": 10,
        },
    )
    train_recipe(recipe, tmp_path / "run")
    assert "collapsed" in capsys.readouterr().err


@pytest.mark.parametrize("changes", [{"training.learning_rate": 1e30}, {"loss.penalty_strength": 1e38}])
def test_a_training_that_diverges_stops_with_advice(changes: dict, tiny_recipe: Recipe, tmp_path: Path) -> None:
    values = {"training.optimizer": "sgd", "training.schedule": "constant", "training.epochs": 3}
    with pytest.raises(RunError, match=r"diverged.*learning_rate"):
        train_recipe(load_recipe(tiny_recipe, {**values, **changes}), tmp_path / "run")
    assert not Run(tmp_path / "run").finished


def test_parameters_that_give_no_numbers_are_no_answer(tiny_run: Run, tmp_path: Path) -> None:
    run = Run(Path(shutil.copytree(tiny_run.path, tmp_path / "run")))
    tensors = load_file(run.weights_file)
    huge = torch.full_like(tensors["head.classifier.weight"], 3e38)
    write_tensors(run.weights_file, {**tensors, "head.classifier.weight": huge})
    made = run.path / "fingerprint.json"
    write_json(made, {key: value for key, value in run.fingerprint.items() if key != "model_sha256"})
    with pytest.raises(RunError, match="no finite numbers"):
        evaluate_run(run)
    damaged = {"model.safetensors": run.weights_file.read_bytes(), "fingerprint.json": made.read_bytes()}
    assert contents(run) == contents(tiny_run) | damaged, "and nothing was written"


def test_early_stopping_follows_the_recipe(tiny_recipe: Recipe, tmp_path: Path) -> None:
    # A rate of almost zero: nothing improves after the first epoch.
    values = {
        "model.method": "metadata_only",
        "training.learning_rate": 1e-12,
        "training.optimizer": "sgd",
        "training.epochs": 20,
        "training.schedule": "constant",
        "training.early_stopping": 3,
        "training.selection": "balanced_accuracy",
        "loss.penalty": 0,
    }
    history = train_recipe(load_recipe(tiny_recipe, values), tmp_path / "run").history
    assert 4 <= len(history) < 20


@pytest.mark.parametrize(
    "overrides",
    [
        {"model.target": "native", "model.decoder": "plain"},
        {"model.decoder": "none", "model.target": "bilinear", "metadata.tier": "M1"},
        {
            "model.method": "no_metadata",
            "metadata.tier": "M0",
            "training.precision": "bf16",
            "augmentation.enabled": False,
        },
        {"model.method": "metadata_only", "data.rows": "all", "metadata.tier": "M2", "metadata.imputation": "zero"},
        {"data.protocol": "grouped-cv", "data.fold": 3, "training.optimizer": "sgd", "training.gradient_clip": 1.0},
    ],
    ids=lambda overrides: " ".join(f"{key.split('.')[1]}={value}" for key, value in overrides.items()),
)
def test_every_kind_of_recipe_trains(overrides: dict, tiny_recipe: Recipe, tmp_path: Path) -> None:
    run = train_recipe(load_recipe(tiny_recipe, {**overrides, "training.epochs": 1}), tmp_path / "run")
    assert 0 <= run.metrics["balanced_accuracy"] <= 1
    assert run.history["train_total"].notna().all()


def test_a_split_that_was_tampered_with_is_refused(tiny_run: Run, tmp_path: Path) -> None:
    folder = Run(Path(shutil.copytree(tiny_run.path, tmp_path / "copy")))
    split = folder.split
    patient = split["patient_id"].value_counts().index[0]
    split.loc[split.index[split["patient_id"] == patient][0], "split"] = "val"
    split.loc[split.index[split["patient_id"] == patient][1:], "split"] = "test"
    split.to_csv(folder.path / "split.csv", index=False)
    with pytest.raises(SplitError, match="more than one split"):
        _ = folder.split


def test_layers_of_the_encoder_learn_the_slower_the_deeper_and_heads_at_the_full_rate(tiny_recipe: Recipe) -> None:
    values = {"training.layer_decay": 0.5, "training.learning_rate": 0.1}
    for name, groups in (("adamw", 2), ("sgd", 1)):
        recipe = load_recipe(tiny_recipe, {**values, "training.optimizer": name})
        model = new_model(recipe, 4, 3)[0]
        optimizer = create_optimizer(model, recipe.training)
        rate = {id(one): group["lr"] for group in optimizer.param_groups for one in group["params"]}
        assert rate.keys() == {id(one) for one in model.parameters()}, "each parameter once"
        parts = [
            model.encoder.body.get_parameter(f"{part}.weight")
            for part in ("conv_stem", "blocks.0.0.conv_dw", "blocks.1.0.conv_pw", "blocks.1.1.conv_pw", "conv_head")
        ]
        rates = [rate[id(one)] for one in (*parts, model.head.hidden.weight)]
        assert rates == sorted(rates)
        assert rates[0] < 0.001
        assert rates[1] == pytest.approx(rates[2] / 2)
        assert rates[-2:] == [0.1, 0.1]
        # What the history shows is the full rate.
        assert [group["lr"] for group in optimizer.param_groups[:groups]] == [0.1] * groups
        decayed = {
            group["weight_decay"] > 0 for group in optimizer.param_groups for one in group["params"] if one.ndim < 2
        }
        assert decayed == {name == "sgd"}


@pytest.mark.parametrize("backbone", ["mobilenet_v2", "resnet50", "densenet121", "vgg13", "vit_b_16", "swin_b"])
def test_frozen_stages_are_the_first_and_stay_in_evaluation(backbone: str) -> None:
    encoder = create_encoder(backbone, "none", 224)
    encoder.freeze_stages(1)
    encoder.train()
    learns = {name: one.requires_grad for name, one in encoder.body.named_parameters()}
    first, last = next(iter(learns)), list(learns)[-1]
    assert not learns[first]
    assert learns[last]
    assert any(not one.training for one in encoder.body.modules())
    for module in encoder.body.modules():
        own = list(module.parameters(recurse=False))
        if own and not list(module.children()):
            assert module.training == own[0].requires_grad
    with pytest.raises(RecipeError, match=r"freeze_stages: .* stages that can be frozen, not 99"):
        encoder.freeze_stages(99)


def test_the_average_is_validated_and_kept_and_a_killed_run_ends_at_the_same_one(
    tiny_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = load_recipe(tiny_recipe, {"training.ema": 0.9, "training.epochs": 3, "training.warm_up": 0.1})
    trained: dict[int, Trainer] = {}
    remember = Trainer._remember

    def keeps_the_trainer(self, *args):
        trained[0] = self
        return remember(self, *args)

    monkeypatch.setattr(Trainer, "_remember", keeps_the_trainer)
    run = train_recipe(load_recipe(recipe, {"training.selection": "last"}), tmp_path / "whole")
    kept, trainer = load_file(run.weights_file), trained[0]
    assert all(torch.equal(kept[name], value) for name, value in trainer.average.module.state_dict().items())
    assert not torch.equal(kept["head.hidden.weight"], trainer.model.head.hidden.weight)
    # 72 training images and 2 steps an epoch or so: the decay is still rising.
    assert trainer.average.get_decay(len(run.history) * 2) < 0.9

    def dies_in_the_third_epoch(self, progress, row, schedule):
        if row["epoch"] == 3:
            raise KeyboardInterrupt
        return remember(self, progress, row, schedule)

    monkeypatch.setattr(Trainer, "_remember", dies_in_the_third_epoch)
    last = load_recipe(recipe, {"training.selection": "last"})
    with pytest.raises(KeyboardInterrupt):
        train_recipe(last, tmp_path / "killed")
    monkeypatch.setattr(Trainer, "_remember", remember)
    assert contents(train_recipe(last, tmp_path / "killed", resume=True)) == contents(run)


def test_two_trainings_do_not_share_a_folder(tiny_recipe: Recipe, tmp_path: Path) -> None:
    with run_lock(tmp_path / "run"), pytest.raises(RunError, match="in use by another training"):
        train_recipe(tiny_recipe, tmp_path / "run")
    assert not list((tmp_path / "run").iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("value", ["0", "first"])
def test_a_process_without_its_group_is_told_so(value: str, sample_root: Path, tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "dualrefnet",
        "train",
        "sample",
        f"data.root={sample_root}",
        "--out",
        tmp_path / "r",
    ]
    done = subprocess.run(command, env={**os.environ, "LOCAL_RANK": value}, capture_output=True, text=True)
    assert done.returncode == 2
    assert "or unset LOCAL_RANK" in done.stderr.splitlines()[-1]


def test_a_start_that_fails_leaves_no_folder_and_one_before_the_first_epoch_blocks_nothing(
    tiny_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = {"training.device": "mps"}, {"model.backbone": "resnet50", "model.weights": "hub"}
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for changes in wrong:
        with pytest.raises((RunError, WeightsError)):
            train_recipe(load_recipe(tiny_recipe, changes), tmp_path / "run")
        assert not (tmp_path / "run").exists()
    monkeypatch.setattr(Trainer, "fit", lambda *arguments: pytest.fail("it would have begun"))
    for seed in (0, 1):
        with pytest.raises(pytest.fail.Exception):
            train_recipe(load_recipe(tiny_recipe, {"seed": seed}), tmp_path / "run")
    assert Run(tmp_path / "run").recipe.seed == 1


def test_a_run_is_overwritten_on_request_and_nothing_else_is(tiny_run: Run, tmp_path: Path) -> None:
    path = Path(shutil.copytree(tiny_run.path, tmp_path / "run"))
    (path / "report").mkdir()
    (path / "notes.txt").write_text("mine")
    with pytest.raises(RunError, match=r"holds notes\.txt"):
        start_run(path, tiny_run.recipe, overwrite=True)
    (path / "notes.txt").unlink()
    with pytest.raises(RunError, match=r"a finished run.*--overwrite"):
        start_run(path, tiny_run.recipe)
    start_run(path, tiny_run.recipe, overwrite=True)
    assert [file.name for file in path.iterdir()] == ["recipe.yaml"]


def test_the_default_folder_is_a_new_one_where_a_finished_run_stays(
    tiny_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert new_folder("tiny") == Path("runs/tiny")
    shutil.copytree(tiny_run.path, "runs/tiny")
    assert re.fullmatch(r"tiny-\d{8}-\d{6}", new_folder("tiny").name)
    assert new_folder("tiny", resume=True) == new_folder("tiny", overwrite=True) == Path("runs/tiny")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert new_folder("tiny") == Path("runs/tiny")


def test_a_folder_in_use_is_not_overwritten(tiny_recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(RunError, match="isn't a run folder"):
        train_recipe(tiny_recipe, tmp_path)
    with pytest.raises(RunError, match="is a file"):
        train_recipe(tiny_recipe, tmp_path / "notes.txt")


def test_train_in_python_takes_overrides(sample_root: Path, tmp_path: Path) -> None:
    run = dualrefnet.train(
        "sample",
        out=tmp_path / "run",
        data__root=str(sample_root),
        model__method="metadata_only",
        training__epochs=1,
        evaluation__bootstrap=0,
    )
    assert run.recipe.training.epochs == 1
    assert "accuracy_ci95" not in run.metrics
