"""Four detectors on one zoo, side by side: `python -m benchmarks.backdoor_detectors ZOO`.

Every model is judged by every detector once, one thread each; what is done is kept under runs/, so a second call
goes on. The record: accuracy with interval, AUROC, recall by attack, false alarms, seconds; with each detector's
own threshold, and with one chosen for it on other models only: for a model of set s and attack a on those of other
sets and other attacks.
"""
from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from sklearn.metrics import roc_auc_score

from data.files import write_json
from data.model_zoo import ZooModel, load_model, read_zoo
from submit.intervals import share_interval
from submit.records import environment

SEED = 0
OWN = {"ours": 0.05, "report": 0.08, "mmbd": 0.05}  # p below which each raises its alarm; TRODO has no number
RECORDS = Path(__file__).parent / "records"


def ours(sample: ZooModel, generator: torch.Generator) -> dict:
    from backdoor_detection.detection import DetectorConfig, detect

    found = detect(load_model(sample), sample.num_classes, sample.images_folder, sample.transformation,
                   DetectorConfig(), generator=generator)
    return {"p": found.p_value, "suspect": found.suspect, "steps": found.steps, "steps_asked": found.steps_asked}


def report(sample: ZooModel, generator: torch.Generator) -> dict:
    from backdoor_detection.margins import ReportConfig
    from backdoor_detection.report import detect

    found = detect(load_model(sample), sample.num_classes, sample.images_folder, sample.transformation,
                   ReportConfig(), generator=generator)
    return {"p": found.p_value, "suspect": found.suspect}


def mmbd(sample: ZooModel, generator: torch.Generator) -> dict:
    from backdoor_detection.mmbd import MmBdConfig, largest_margins
    from backdoor_detection.outlier import gamma_p_value

    model, images = load_model(sample), _clean(sample, generator)
    margins = largest_margins(model, sample.num_classes, tuple(images.pixels.shape[1:]), images.mean, images.std,
                              MmBdConfig(), generator=generator)
    return {"p": gamma_p_value(margins), "suspect": int(margins.argmax())}


def trodo(sample: ZooModel, generator: torch.Generator) -> dict:
    from backdoor_detection.trodo import TrodoConfig, score

    return {"score": score(load_model(sample), _clean(sample, generator), TrodoConfig(), generator=generator)}


def _clean(sample: ZooModel, generator: torch.Generator):
    from backdoor_detection.clean_images import read_clean_images

    return read_clean_images(sample.images_folder, sample.transformation, size=None, channels=3, generator=generator)


DETECTORS = {"ours": ours, "trodo": trodo, "report": report, "mmbd": mmbd}


def judged(sample: ZooModel, detector: str, file: Path) -> None:
    """One verdict, kept in `file`."""
    torch.set_num_threads(1)
    start = time.perf_counter()
    found = DETECTORS[detector](sample, torch.Generator().manual_seed(SEED))
    write_json(file, {**found, "seconds": time.perf_counter() - start})


def suspicion(found: dict) -> float:
    """Larger = more suspicious: TRODO's score, else -log10 p."""
    return found["score"] if "score" in found else -float(np.log10(max(found["p"], 1e-300)))


def best_threshold(scores: np.ndarray, truth: np.ndarray) -> float:
    """Midway between two neighbouring scores, where the mean of recall and 1 - false alarms is largest."""
    values = np.unique(scores)
    cuts = np.concatenate([[values[0] - 1], (values[1:] + values[:-1]) / 2, [values[-1] + 1]])
    balanced = [((scores[truth] > cut).mean() + (scores[~truth] <= cut).mean()) / 2 for cut in cuts]
    return float(cuts[int(np.argmax(balanced))])


def held_out_verdicts(rows: list[dict], scores: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Each model under the threshold that models of other sets and other attacks chose."""
    found = []
    for row, score in zip(rows, scores, strict=True):
        other = np.array([r["set"] != row["set"] and (r["attack"] is None or r["attack"] != row["attack"])
                          for r in rows])
        found.append(score > best_threshold(scores[other], truth[other]))
    return np.array(found)


def without(key: str, rows: list[dict], scores: np.ndarray, truth: np.ndarray) -> dict:
    """Leave one attack or set out: the threshold of the others, and what it does on the one (and all clean models)."""
    table = {}
    for value in sorted({row[key] for row in rows if row[key]}):
        inside = np.array([row[key] == value for row in rows])
        cut = best_threshold(scores[~inside], truth[~inside])
        recall, alarms = scores[inside & truth] > cut, scores[(inside if key == "set" else True) & ~truth] > cut
        table[value] = {"threshold": cut, "recall": _mean(recall), "backdoored": len(recall),
                        "false_alarms": _mean(alarms), "clean": len(alarms)}
    return table


def _mean(values: np.ndarray) -> float | None:
    return float(values.mean()) if len(values) else None


def figures(verdicts: np.ndarray, truth: np.ndarray, rows: list[dict]) -> dict:
    """Accuracy with its interval, recall by attack and false-alarm rate."""
    right = verdicts == truth
    attacks = sorted({row["attack"] for row in rows if row["attack"]})
    by_attack = {name: float(np.mean([v for v, row in zip(verdicts, rows, strict=True) if row["attack"] == name]))
                 for name in attacks}
    return {"accuracy": 100 * float(right.mean()), "interval_95": list(share_interval(right, SEED)),
            "recall": _mean(verdicts[truth]), "recall_by_attack": by_attack, "false_alarms": _mean(verdicts[~truth])}


def summary(rows: list[dict], found: list[dict], detector: str) -> dict:
    scores, truth = np.array([suspicion(f) for f in found]), np.array([row["attack"] is not None for row in rows])
    result = {"models": len(rows), "backdoored": int(truth.sum()), "auroc": 100 * float(roc_auc_score(truth, scores)),
              "median_seconds": statistics.median(f["seconds"] for f in found),
              "most_seconds": max(f["seconds"] for f in found)}
    hits = [f["suspect"] == row["target"] for f, row in zip(found, rows, strict=True)
            if row["attack"] and "suspect" in f]
    if hits:
        result["target_named"] = float(np.mean(hits))
    if detector in OWN:
        result["own_threshold"] = {"p": OWN[detector],
                                   **figures(scores > -np.log10(OWN[detector]), truth, rows)}
    if len({row["set"] for row in rows}) > 1:
        result["held_out_threshold"] = figures(held_out_verdicts(rows, scores, truth), truth, rows)
        result["leave_one_set_out"] = without("set", rows, scores, truth)
    result["leave_one_attack_out"] = without("attack", rows, scores, truth)
    return result


def judge_all(models: list[ZooModel], work: Path, detectors: list[str], workers: int) -> None:
    """Every verdict that `work` lacks, the quick detectors first."""
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        futures = {pool.submit(judged, sample, detector, file): file for detector in detectors for sample in models
                   if not (file := work / detector / f"{sample.name}.json").exists()}
        for done, future in enumerate(as_completed(futures)):
            future.result()
            print(f"{done + 1}/{len(futures)} {futures[future]}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("zoo", type=Path)
    parser.add_argument("--detectors", default=",".join(DETECTORS), help="some of them, with commas between")
    parser.add_argument("--max-classes", type=int, default=10**6, help="models of more classes are left out")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path, help="record; default benchmarks/records/backdoor_detectors_<zoo>.json")
    options = parser.parse_args()
    models = [m for m in read_zoo(options.zoo).models if m.num_classes <= options.max_classes]
    work, detectors = Path("runs") / "backdoor_detectors" / options.zoo.name, options.detectors.split(",")
    judge_all(models, work, detectors, options.workers)
    rows = [{"model": m.name, "set": m.record["set"], "attack": m.record["attack"], "target": m.record["target"],
             "radius": m.record.get("radius", 0.0)} for m in models]
    results, verdicts = {}, {}
    for detector in detectors:
        verdicts[detector] = [json.loads((work / detector / f"{m.name}.json").read_text()) for m in models]
        results[detector] = summary(rows, verdicts[detector], detector)
    parts = [{**row, **{d: {k: v for k, v in verdicts[d][i].items() if k != "seconds"} for d in detectors}}
             for i, row in enumerate(rows)]
    command = f"python -m benchmarks.backdoor_detectors {options.zoo.name} --detectors {options.detectors}"
    write_json(options.out or RECORDS / f"backdoor_detectors_{options.zoo.name}.json",
               {"command": command, "detectors": results, "models": parts,
                "environment": environment()})
    for detector, found in results.items():
        own, held = found.get("own_threshold"), found.get("held_out_threshold")
        print(f"{detector:7} AUROC {found['auroc']:5.1f}", f"own {own['accuracy']:5.1f} %" if own else "",
              f"held-out threshold {held['accuracy']:5.1f} %" if held else "",
              f"{found['median_seconds']:.1f} s a model")


if __name__ == "__main__":
    main()
