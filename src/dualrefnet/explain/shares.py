"""One prediction shared out among players by shap's permutation explainer.

A player's value is what its coming adds to the prediction, averaged over the orders in which the players can come (Shapley 1953;
Lundberg and Lee 2017). Orders are drawn at random, and each is gone through forwards and backwards. Values are exact where no more
than two players act on each other, else estimates whose error is told; that they add up is exact in any case, and is checked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dualrefnet.errors import DependencyError
from dualrefnet.explain.players import Player

try:
    from shap import PermutationExplainer
except ImportError:
    raise DependencyError("Shapley values need shap: pip install 'dualrefnet[explain]'") from None

# (R, M) float32 forms -> (R, C) probabilities.
Classifier = Callable[[NDArray[np.float32]], NDArray[np.float64]]

# How far base + values may be from the prediction: rounding of float32 is a hundred times smaller.
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Shares:
    """A prediction, shared out.

    Attributes:
        values: (P, C), what each player adds to the probability of each class.
        errors: (P, C), standard errors of the values, from how they differ between the orders.
        base: (C,), mean probability with the background's forms.
        prediction: (C,), with the own form.
    """

    values: NDArray[np.float64]
    errors: NDArray[np.float64]
    base: NDArray[np.float64]
    prediction: NDArray[np.float64]


def share_out(
    classify: Classifier,
    form: NDArray[np.float32],
    background: NDArray[np.float32],
    players: tuple[Player, ...],
    permutations: int,
    seed: int,
) -> Shares:
    """Share the prediction for one form out among the players.

    Args:
        classify: what is explained.
        form: (M,) the patient's.
        background: (B, M) forms of others, from which hidden answers are taken.
        players: each of the M columns belongs to one of them.
        permutations: orders of the players; at least 1.
        seed: of the orders.

    Raises:
        ValueError: the players don't share all columns out among them, or there is no permutation.
        ArithmeticError: base and values don't add up to the prediction.
    """
    if permutations < 1:
        raise ValueError(f"permutations must be at least 1, not {permutations}")
    masker = _Forms(form, background, players)
    with _numpy_keeps_its_state():
        explainer = PermutationExplainer(classify, masker, seed=seed)
        explanation = explainer(
            np.arange(len(players))[None],
            # Players whose columns are the same in all forms add nothing, and shap leaves them out of the orders.
            max_evals=permutations * (2 * int((~masker.invariants()).any(axis=0).sum()) + 1),
            batch_size=2 * len(players) + 1,
            error_bounds=True,
            silent=True,
        )
    prediction = classify(form[None])[0]
    values, spread = (np.reshape(part[0], (len(players), -1)) for part in (explanation.values, explanation.error_std))
    # As if forwards and backwards were two draws; they are better than that, and the error is rather smaller.
    shares = Shares(values, spread / np.sqrt(2 * permutations), np.reshape(explanation.base_values[0], -1), prediction)
    gap = float(np.abs(shares.base + shares.values.sum(axis=0) - prediction).max())
    # Written so that NaN is an error too.
    if not gap <= TOLERANCE:
        raise ArithmeticError(
            f"base and Shapley values are {gap:.2g} away from the predicted probability, more than {TOLERANCE:g}: "
            "the model doesn't answer the same question twice in the same way"
        )
    return shares


class _Forms:
    """shap's masker: the patient's answers where a player takes part, those of every other patient where not.

    Attributes:
        shape: (B, P): rows that a call returns, and players.
        immutable_outputs: shap need not copy what a call returns.
    """

    immutable_outputs = True

    def __init__(self, form: NDArray[np.float32], background: NDArray[np.float32], players: tuple[Player, ...]) -> None:
        columns = [column for player in players for column in player.columns]
        if sorted(columns) != list(range(len(form))):
            raise ValueError(f"each of the {len(form)} columns must belong to one player, and to one only")
        self._form, self._background = form, background
        # (M,): whose column it is.
        self._owner = np.empty(len(form), dtype=np.int64)
        for number, player in enumerate(players):
            self._owner[list(player.columns)] = number
        same = background == form
        self._same = np.stack([same[:, list(player.columns)].all(axis=1) for player in players], axis=1)
        self.shape = self._same.shape

    def __call__(self, mask: NDArray[np.bool_], _: NDArray[np.int64]) -> NDArray[np.float32]:
        """Return (B, M) forms of one coalition, a (P,) mask."""
        return np.where(mask[self._owner], self._form, self._background)

    def invariants(self, *_: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Return (B, P): where a player's coming changes nothing, so that shap needn't ask the model again."""
        return self._same


@contextmanager
def _numpy_keeps_its_state() -> Iterator[None]:
    """Put numpy's global generator, which shap seeds and draws from, back as it was."""
    state = np.random.get_state()  # noqa: NPY002
    try:
        yield
    finally:
        np.random.set_state(state)  # noqa: NPY002
