import time
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from dualrefnet.deploy.parity import Cases, check_parity, compare, measure_int8, predict_cases, quantise
from dualrefnet.runtime.bundle import OnnxNetwork
from dualrefnet.runtime.classifier import Network, NetworkOutput
from test_export import CLASSES, random_cases, tiny_method, written


@pytest.fixture(scope="module")
def float_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with learned tokens, photograph and form."""
    return written(*tiny_method("dualrefnet", tokens=True), tmp_path_factory.mktemp("float"))[1]


@pytest.fixture(scope="module")
def int8_file(float_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("int8") / "model.int8.onnx"
    quantise(float_file, out, random_cases(40))
    return out


def test_the_encoder_is_in_whole_numbers_and_the_rest_in_float(int8_file: Path) -> None:
    graph = onnx.load(int8_file).graph
    maker = {name: node for node in graph.node for name in node.output}
    weights = {one.name: numpy_helper.to_array(one) for one in graph.initializer}
    convolutions = [node for node in graph.node if node.op_type == "Conv"]
    assert len(convolutions) == 5
    for node in convolutions:
        photograph, kernel = (maker[name] for name in node.input[:2])
        assert photograph.op_type == kernel.op_type == "DequantizeLinear"
        assert weights[kernel.input[0]].dtype == np.int8
        # A scale for each channel.
        assert weights[kernel.input[1]].shape == (weights[kernel.input[0]].shape[0],)
        assert weights[photograph.input[2]].dtype == np.uint8
    layers = [node for node in graph.node if node.op_type == "Gemm"]
    assert len(layers) == 6, "four of the metadata network, two of the head"
    for node in layers:
        assert weights[node.input[1]].dtype == np.float32
        assert node.input[0] not in maker or maker[node.input[0]].op_type != "DequantizeLinear"


def test_answers_stay_near_and_gaps_stay_gaps(float_file: Path, int8_file: Path) -> None:
    cases, absent = random_cases(30, tokens=True), np.arange(30) % 3 == 0
    first, second = (predict_cases(OnnxNetwork(file), cases, absent) for file in (float_file, int8_file))
    assert 0 < compare(first.logits, second.logits)["max_probability_difference"] < 0.05
    assert np.isnan(second.vectors).all(axis=1).tolist() == absent.tolist()
    # Without a photograph nothing is left that was rounded.
    np.testing.assert_allclose(second.logits[absent], first.logits[absent], atol=1e-5)
    kept, made = (onnx.load(file) for file in (float_file, int8_file))
    assert {one.key: one.value for one in made.metadata_props} == {one.key: one.value for one in kept.metadata_props}
    assert made.producer_name == "dualrefnet"


def test_ranges_come_from_the_photographs_given_and_from_all_of_them(float_file: Path, tmp_path: Path) -> None:
    def first_scale(cases: Cases) -> float:
        quantise(float_file, tmp_path / "int8.onnx", cases)
        graph = onnx.load(tmp_path / "int8.onnx").graph
        node = next(node for node in graph.node if node.op_type == "QuantizeLinear")
        return float(next(numpy_helper.to_array(one) for one in graph.initializer if one.name == node.input[1]))

    def grey(*values: int) -> Cases:
        pictures = np.stack([np.full((32, 32, 3), value, dtype=np.uint8) for value in values])
        return Cases(pictures, np.zeros((len(values), 6), dtype=np.float32))

    # Normalised with means .5 .4 .3 and deviations .2 .3 .4: black is -2.5 at least, white 2.5 at most; the range holds
    # 0.
    assert first_scale(grey(0)) == pytest.approx(2.5 / 255, rel=1e-3)
    # The white one is the last of 33, in a batch of its own.
    assert first_scale(grey(*[0] * 32, 255)) == pytest.approx(5 / 255, rel=1e-3)


class Answers:
    """A network that answers one row of logits a case, after a while."""

    def __init__(self, right: int, seconds: float, alarm: bool = False) -> None:
        self.right, self.seconds, self.alarm = right, seconds, alarm
        self.place = 0

    def __call__(self, images, absent, forms) -> NetworkOutput:
        time.sleep(self.seconds)
        numbers = images[:, 0, 0, 0].astype(int)
        labels = np.where(numbers < self.right, numbers % CLASSES, (numbers + 1) % CLASSES)
        return NetworkOutput(10 * np.eye(CLASSES)[labels], np.full((len(forms), 1), 2.0 if self.alarm else 0.0))


class Check:
    """A check of pictures whose score is the vector itself."""

    def score(self, vectors: np.ndarray) -> np.ndarray:
        return vectors[:, 0]


def numbered(count: int) -> Cases:
    pictures = np.zeros((count, 2, 2, 3), dtype=np.uint8) + np.arange(count, dtype=np.uint8)[:, None, None, None]
    return Cases(pictures, np.zeros((count, 1), dtype=np.float32), np.arange(count) % CLASSES)


@pytest.mark.parametrize(
    ("right", "slow", "quick", "words", "worth"),
    [
        (30, 0.02, 0.004, "times as fast as float32", True),
        (30, 0.004, 0.02, "not faster on this machine", False),
        (15, 0.02, 0.004, "a loss", False),
    ],
)
def test_the_verdict_says_whether_int8_is_worth_having(
    right: int, slow: float, quick: float, words: str, worth: bool
) -> None:
    classes = ("A", "B", "C")
    measured, verdict, worth_it = measure_int8(
        Answers(30, slow), Answers(right, quick, True), numbered(30), classes, Check()
    )
    assert words in verdict
    assert worth_it is worth
    assert ("Use model.onnx" in verdict) is not worth
    assert measured["float32"] == {"accuracy": 1.0, "balanced_accuracy": 1.0, "false_alarms": 0.0}
    assert measured["int8"] == {
        "accuracy": right / 30,
        "balanced_accuracy": pytest.approx(right / 30),
        "false_alarms": 1.0,
    }
    assert measured["same_label"] == right / 30
    assert measured["cases"] == 30
    assert [one["batch"] for one in measured["speed"]] == [1, 8]


def logits_of(rows: NetworkOutput | np.ndarray, calls: list[int] | None = None, seconds: float = 0.0) -> Network:
    """A network that answers with the mean of the picture, or as it is told."""

    def network(images, absent, forms) -> NetworkOutput:
        time.sleep(seconds)
        if calls is not None:
            calls.append(len(forms))
        gone = np.zeros(len(forms)) if absent is None else absent.astype(float)
        return NetworkOutput(np.stack([images.mean(axis=(1, 2, 3)) / 255, gone * rows], axis=1), None)

    return network


def test_parity_of_models_with_tokens_is_checked_where_photographs_are_missing() -> None:
    cases = random_cases(20)
    heeds, ignores = logits_of(1.0), logits_of(0.0)
    assert check_parity(heeds, ignores, cases, learned_tokens=False)["max_probability_difference"] == 0
    found = check_parity(heeds, ignores, cases, learned_tokens=True)
    assert found["max_probability_difference"] > 0.2
    assert found["cases"] == 40
