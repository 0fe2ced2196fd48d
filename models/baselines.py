"""What a network has to beat: six classical learners on the same inputs, the same folds, and floors.

::

    (N, F), NaN where unknown ─ training median ─ scaled ─ learner, chosen by inner folds ─ sharpness ─ prevalence ─▶ (N,) probabilities

* **Missing values** become the training part's median, with no indicator: which values were taken is itself a shortcut to the
  outcome, and has its own floor (`missing_table`). scikit-learn's gradient boosting would split on NaN, so it is given imputed
  values as the others are; ``gradient boosting, missingness seen`` is the same learner, told which are unknown, and no fair rival.
* **Choice**: each learner has four settings, tried in inner folds that keep a patient's studies together; the highest pooled AUROC wins.
* **Probabilities**: the inner folds' scores give one factor, as a temperature does for the network; it changes no order. Learners with
  balanced class weights pretend a prevalence of one half, so the training part's is put back in.

Give stratified folds. Where the folds' prevalences differ, each fold's probabilities lean to the prevalence of the others, and the
AUROC of all folds pooled falls: on noise, 54 patients, five folds, to 0.35 to 0.39 for unstratified ones, and
to 0.48 to 0.51 for stratified ones.

A value's comparator ("<") and age are not used here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar
from scipy.special import expit, logit
from sklearn.ensemble import HistGradientBoostingClassifier, RandomForestClassifier
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss, roc_auc_score
from sklearn.model_selection import StratifiedGroupKFold, cross_val_predict
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC
from sklearn.tree import DecisionTreeClassifier
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

if TYPE_CHECKING:
    from models.transforms import Sample

FloatArray = NDArray[np.float64]
#: Indices of the training and of the held-out studies.
Split = tuple[NDArray[np.int64], NDArray[np.int64]]

INNER_FOLDS: Final = 3
TREES = 100
#: A leaf or a neighborhood of one class says 0 or 1; no odds are believed beyond this.
SUREST: Final = 1e-3
#: Below every value: trees part it from the others, and so see which values are unknown.
UNKNOWN: Final = -1e9


def _imputed(learner: Any) -> Pipeline:
    """Impute and scale by the training part alone; a column that is never known there becomes 0."""
    return Pipeline(
        [("impute", SimpleImputer(strategy="median", keep_empty_features=True)), ("scale", StandardScaler()), ("learner", learner)]
    )


def _boosting(seed: int) -> HistGradientBoostingClassifier:
    # No early stopping: the studies it would hold out come from patients it trains on.
    return HistGradientBoostingClassifier(
        max_iter=50, min_samples_leaf=10, early_stopping=False, class_weight="balanced", random_state=seed
    )


#: By name, what makes the untrained pipeline from a seed. Nearest neighbors know no class weights.
BASELINES: Final[Mapping[str, Callable[[int], Pipeline]]] = {
    "logistic regression": lambda seed: _imputed(LogisticRegression(class_weight="balanced", max_iter=5000, random_state=seed)),
    "SVM": lambda seed: _imputed(SVC(kernel="rbf", class_weight="balanced", random_state=seed)),
    "random forest": lambda seed: _imputed(RandomForestClassifier(TREES, class_weight="balanced", random_state=seed)),
    "nearest neighbors": lambda _: _imputed(KNeighborsClassifier()),
    "decision tree": lambda seed: _imputed(DecisionTreeClassifier(class_weight="balanced", random_state=seed)),
    "gradient boosting": lambda seed: _imputed(_boosting(seed)),
    "gradient boosting, missingness seen": lambda seed: Pipeline(
        # Not its own NaN: it fails on a column that holds nothing else, as a column of a few studies may in an inner fold.
        [("mark", SimpleImputer(strategy="constant", fill_value=UNKNOWN, keep_empty_features=True)), ("learner", _boosting(seed))]
    ),
}

#: By name, the one parameter that is chosen and its four settings; the first stands where nothing can be chosen.
SETTINGS: Final[Mapping[str, tuple[str, tuple[float, ...]]]] = {
    "logistic regression": ("C", (0.1, 0.001, 0.01, 1.0)),
    "SVM": ("C", (1.0, 0.1, 10.0, 100.0)),
    "random forest": ("min_samples_leaf", (3, 1, 8, 16)),
    "nearest neighbors": ("n_neighbors", (9, 3, 15, 25)),
    "decision tree": ("max_depth", (2, 1, 3, 5)),
    "gradient boosting": ("max_depth", (2, 1, 3, 4)),
    "gradient boosting, missingness seen": ("max_depth", (2, 1, 3, 4)),
}


def fit_predict(
    name: str, train_x: FloatArray, train_y: FloatArray, test_x: FloatArray, *, seed: int, groups: Sequence[Any] | NDArray[Any]
) -> FloatArray:
    """Train one baseline and give the test studies' probabilities of the positive class.

    Parameters
    ----------
    name
        A key of `BASELINES`.
    train_x, test_x
        (N, F) and (M, F), NaN where unknown.
    train_y
        (N,) of 0 and 1; studies with NaN are not trained on.
    groups
        (N,), the patient of each training study; the inner folds never part a patient.

    Returns
    -------
    NDArray
        (M,) probabilities. If the training part holds one class only: that class's, 0 or 1, for all.

    Raises
    ------
    ValueError
        The name is unknown, or no training study has a label.

    References
    ----------
    Guo et al., arXiv:1706.04599 (temperature). Elkan, "The foundations of cost-sensitive learning", IJCAI 2001 (prevalence).
    """
    if name not in BASELINES:
        raise ValueError(f"{name!r} is no baseline; known are {', '.join(BASELINES)}.")
    known = ~np.isnan(train_y)
    if not known.any():
        raise ValueError("No study of the training part has a label.")
    x, y = train_x[known], train_y[known].astype(np.int64)
    prevalence = float(y.mean())
    if prevalence in (0.0, 1.0):
        return np.full(len(test_x), prevalence)
    model = BASELINES[name](seed)
    parameter, values = SETTINGS[name]
    splits = _inner_folds(y, np.asarray(groups)[known], seed)
    # More neighbors than studies is an error; the other whole numbers lose nothing by the same bound.
    fewest = min((len(train) for train, _ in splits), default=len(y))
    settings = [{f"learner__{parameter}": min(v, fewest) if isinstance(v, int) else v} for v in values]
    # One thread: the studies are few, and boosting's threads wait for each other a hundred times longer on a busy machine.
    with threadpool_limits(1):
        setting, sharpness = _choose(model, settings, x, y, splits)
        model.set_params(**setting).fit(x, y)
        scores = _evidence(model, getattr(model, _method(model))(test_x), prevalence)
    return np.asarray(expit(sharpness * scores + logit(prevalence)), np.float64)


def stacked(train_x: FloatArray, train_y: FloatArray, test_x: FloatArray) -> FloatArray:
    """Weigh single sources' log-odds (N, M) by a logistic regression: (T, M) → (T,) probabilities; the mean if one class is there."""
    known = ~np.isnan(train_y)
    if len(np.unique(train_y[known])) < 2:
        return np.asarray(expit(test_x.mean(1)), np.float64)
    model = LogisticRegression(max_iter=1000).fit(train_x[known], train_y[known])
    return np.asarray(model.predict_proba(test_x)[:, 1], np.float64)


def value_table(samples: Sequence[Sample]) -> FloatArray:
    """Make (N, V) of the studies' values, as the network gets them, NaN where there is none."""
    return np.stack([np.where(s["number_mask"].numpy(), s["numbers"].numpy(), np.nan) for s in samples]).astype(np.float64)


def missing_table(samples: Sequence[Sample]) -> FloatArray:
    """Make (N, V) of 1 where a study has the value and 0 where not: all that the floor "missingness alone" may see."""
    return np.stack([s["number_mask"].numpy() for s in samples]).astype(np.float64)


def _inner_folds(y: NDArray[np.int64], owners: NDArray[Any], seed: int) -> list[Split]:
    """Part the training studies by group; none where one class has a single group, or a part would lack a class."""
    count = min(INNER_FOLDS, *(len(np.unique(owners[y == value])) for value in (0, 1)))
    if count < 2:
        return []
    splits = list(StratifiedGroupKFold(count, shuffle=True, random_state=seed).split(y[:, None], y, owners))
    whole = all(len(np.unique(y[train])) == 2 and len(test) for train, test in splits)
    return splits if whole else []


def _choose(
    model: Pipeline, settings: Sequence[dict[str, Any]], x: FloatArray, y: NDArray[np.int64], splits: list[Split]
) -> tuple[dict[str, Any], float]:
    """Find the setting of highest pooled inner AUROC, the first among equals, and the factor that its scores want."""
    if not splits:
        return settings[0], 1.0
    tried: list[tuple[float, FloatArray]] = []
    for setting in settings:
        model.set_params(**setting)
        scores = _evidence(model, cross_val_predict(model, x, y, cv=splits, method=_method(model)), float(y.mean()))
        tried.append((float(roc_auc_score(y, scores)), scores))
    best = max(range(len(tried)), key=lambda index: tried[index][0])
    weights = np.where(y == 1, 0.5 / y.mean(), 0.5 / (1 - y.mean()))  # the scores are of a prevalence of one half

    # Bounded, so that a fold without any signal still orders its studies among the others'.
    def loss(exponent: float) -> float:
        return float(log_loss(y, expit(np.exp(exponent) * tried[best][1]), sample_weight=weights))

    return settings[best], float(np.exp(minimize_scalar(loss, bounds=(-2.0, 3.0), method="bounded").x))


def _method(model: Pipeline) -> str:
    return "decision_function" if hasattr(model, "decision_function") else "predict_proba"


def _evidence(model: Pipeline, found: FloatArray, prevalence: float) -> FloatArray:
    """Scores (N,), 0 where the study speaks for neither class, from decisions (N,) or probabilities (N, 2)."""
    scores = found if found.ndim == 1 else logit(found[:, 1].clip(SUREST, 1 - SUREST))
    balanced = hasattr(model[-1], "class_weight")
    return np.asarray(scores if balanced else scores - logit(prevalence), np.float64)
