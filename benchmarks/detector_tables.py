"""Tables of what detectors said of networks: accuracy with interval, AUROC, recall by attack, false alarms, seconds.

With each detector's own threshold, and with one chosen for it on other networks only: for one of set s and attack a on
those of other sets and other attacks. A figure that so few networks do not give is None, or its row is not there.
A row of a network holds `set`, `attack` (None = clean) and `target`; what a detector found `p` or `score`, perhaps
`suspect`, and `seconds`.
"""
from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

import numpy as np
from sklearn.metrics import roc_auc_score

from submit.intervals import share_interval

SEED = 0  # of the bootstrap
OWN = {"ours": 0.05, "report": 0.08, "mmbd": 0.05}  # p below which each raises its alarm; TRODO has no number


def suspicion(found: Mapping) -> float:
    """Larger = more suspicious: TRODO's score, else -log10 p."""
    return found["score"] if "score" in found else -float(np.log10(max(found["p"], 1e-300)))


def both_kinds(truth: np.ndarray) -> bool:
    """Whether clean and backdoored networks are among them: else there is nothing to tell apart."""
    return bool(truth.any() and not truth.all())


def best_threshold(scores: np.ndarray, truth: np.ndarray) -> float:
    """Midway between two neighbouring scores, where the mean of recall and 1 - false alarms is largest."""
    values = np.unique(scores)
    cuts = np.concatenate([[values[0] - 1], (values[1:] + values[:-1]) / 2, [values[-1] + 1]])
    balanced = [((scores[truth] > cut).mean() + (scores[~truth] <= cut).mean()) / 2 for cut in cuts]
    return float(cuts[int(np.argmax(balanced))])


def held_out_verdicts(rows: Sequence[Mapping], scores: np.ndarray, truth: np.ndarray) -> list[bool | None]:
    """Each network under the threshold that those of other sets and other attacks chose; None where they are of one
    kind alone."""
    found = []
    for row, score in zip(rows, scores, strict=True):
        other = np.array([r["set"] != row["set"] and (r["attack"] is None or r["attack"] != row["attack"])
                          for r in rows])
        found.append(bool(score > best_threshold(scores[other], truth[other])) if both_kinds(truth[other]) else None)
    return found


def without(key: str, rows: Sequence[Mapping], scores: np.ndarray, truth: np.ndarray) -> dict:
    """Leave one attack or set out: the threshold of the others, and what it does on it (and all clean ones)."""
    table = {}
    for value in sorted({row[key] for row in rows if row[key]}):
        inside = np.array([row[key] == value for row in rows])
        if not both_kinds(truth[~inside]):
            continue
        cut = best_threshold(scores[~inside], truth[~inside])
        recall, alarms = scores[inside & truth] > cut, scores[(inside if key == "set" else True) & ~truth] > cut
        table[value] = {"threshold": cut, "recall": _mean(recall), "backdoored": len(recall),
                        "false_alarms": _mean(alarms), "clean": len(alarms)}
    return table


def _mean(values: np.ndarray) -> float | None:
    return float(values.mean()) if len(values) else None


def figures(verdicts: np.ndarray, truth: np.ndarray, rows: Sequence[Mapping]) -> dict:
    """Accuracy with its interval, recall by attack and false-alarm rate, of as many networks as `models` says."""
    right = verdicts == truth
    attacks = sorted({row["attack"] for row in rows if row["attack"]})
    by_attack = {name: float(np.mean([v for v, row in zip(verdicts, rows, strict=True) if row["attack"] == name]))
                 for name in attacks}
    return {"models": len(rows), "accuracy": 100 * float(right.mean()),
            "interval_95": list(share_interval(right, SEED)), "recall": _mean(verdicts[truth]),
            "recall_by_attack": by_attack, "false_alarms": _mean(verdicts[~truth])}


def summary(rows: Sequence[Mapping], found: Sequence[Mapping], detector: str) -> dict:
    """All figures of one detector; at least one network."""
    scores, truth = np.array([suspicion(f) for f in found]), np.array([row["attack"] is not None for row in rows])
    auroc = 100 * float(roc_auc_score(truth, scores)) if both_kinds(truth) else None
    result = {"models": len(rows), "backdoored": int(truth.sum()), "auroc": auroc,
              "median_seconds": statistics.median(f["seconds"] for f in found),
              "most_seconds": max(f["seconds"] for f in found)}
    hits = [f["suspect"] == row["target"] for f, row in zip(found, rows, strict=True)
            if row["attack"] and "suspect" in f]
    if hits:
        result["target_named"] = float(np.mean(hits))
    if detector in OWN:
        result["own_threshold"] = {"p": OWN[detector],
                                   **figures(scores > -np.log10(OWN[detector]), truth, rows)}
    return result | _of_other_models(rows, scores, truth)


def _of_other_models(rows: Sequence[Mapping], scores: np.ndarray, truth: np.ndarray) -> dict:
    """The figures with thresholds that other networks chose."""
    result = {}
    if len({row["set"] for row in rows}) > 1:
        verdicts = held_out_verdicts(rows, scores, truth)
        told = [i for i, verdict in enumerate(verdicts) if verdict is not None]
        if told:
            result["held_out_threshold"] = figures(np.array([verdicts[i] for i in told]), truth[told],
                                                   [rows[i] for i in told])
        result["leave_one_set_out"] = without("set", rows, scores, truth)
    result["leave_one_attack_out"] = without("attack", rows, scores, truth)
    return result


def tables(rows: Sequence[Mapping], verdicts: Mapping[str, Sequence[Mapping]]) -> dict:
    """The part of a record that every comparison has: `detectors`, their figures; `models`, each with what was said."""
    parts = [{**row, **{d: {k: v for k, v in found[i].items() if k != "seconds"} for d, found in verdicts.items()}}
             for i, row in enumerate(rows)]
    return {"detectors": {d: summary(rows, found, d) for d, found in verdicts.items()} if rows else {},
            "models": parts}


def lines(results: Mapping[str, Mapping]) -> list[str]:
    """A line a detector."""
    shown = []
    for detector, found in results.items():
        auroc = "  -  " if found["auroc"] is None else f"{found['auroc']:5.1f}"
        own, held = found.get("own_threshold"), found.get("held_out_threshold")
        shown.append(" ".join([f"{detector:7} AUROC {auroc}", f"own {own['accuracy']:5.1f} %" if own else "",
                               f"held-out threshold {held['accuracy']:5.1f} %" if held else "",
                               f"{found['median_seconds']:.1f} s a model"]))
    return shown
