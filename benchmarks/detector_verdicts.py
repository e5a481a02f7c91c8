"""The verdict of each of four detectors on one network of a zoo, on the device of choice."""
from __future__ import annotations

import time

import torch

from data.errors import expect
from data.model_zoo import ZooModel, load_model
from submit.kept_units import code_of_modules

SEED = 0


def ours(sample: ZooModel, device: torch.device, generator: torch.Generator) -> dict:
    from backdoor_detection.detection import DetectorConfig, detect

    found = detect(load_model(sample).to(device), sample.num_classes, sample.images_folder, sample.transformation,
                   DetectorConfig(), generator=generator)
    return {"p": found.p_value, "p_values": list(found.p_values), "suspect": found.suspect, "steps": found.steps,
            "steps_asked": found.steps_asked}


def report(sample: ZooModel, device: torch.device, generator: torch.Generator) -> dict:
    from backdoor_detection.margins import ReportConfig
    from backdoor_detection.report import detect

    found = detect(load_model(sample).to(device), sample.num_classes, sample.images_folder, sample.transformation,
                   ReportConfig(), generator=generator)
    return {"p": found.p_value, "suspect": found.suspect}


def mmbd(sample: ZooModel, device: torch.device, generator: torch.Generator) -> dict:
    from backdoor_detection.mmbd import MmBdConfig, largest_margins
    from backdoor_detection.outlier import gamma_p_value

    model, images = load_model(sample).to(device), _clean(sample, generator)
    margins = largest_margins(model, sample.num_classes, tuple(images.pixels.shape[1:]), images.mean, images.std,
                              MmBdConfig(), generator=generator)
    return {"p": gamma_p_value(margins), "suspect": int(margins.argmax())}


def trodo(sample: ZooModel, device: torch.device, generator: torch.Generator) -> dict:
    from backdoor_detection.trodo import TrodoConfig, score

    model, images = load_model(sample).to(device), _clean(sample, generator)
    return {"score": score(model, images, TrodoConfig(), generator=generator)}


def _clean(sample: ZooModel, generator: torch.Generator):
    from backdoor_detection.clean_images import read_clean_images

    return read_clean_images(sample.images_folder, sample.transformation, size=None, channels=3, generator=generator)


DETECTORS = {"ours": ours, "trodo": trodo, "report": report, "mmbd": mmbd}


def verdict(sample: ZooModel, detector: str, device: torch.device) -> dict:
    """What the detector says of the network, and the seconds it took; it draws the same for every network."""
    start = time.perf_counter()
    found = DETECTORS[detector](sample, device, torch.Generator().manual_seed(SEED))
    return {**found, "seconds": time.perf_counter() - start}


def detectors_code() -> str:
    """Names the code of all detectors: verdicts that are kept by it are found again only where none changed."""
    from backdoor_detection import detection, mmbd, report, trodo

    return code_of_modules(detection, mmbd, report, trodo, packages=("backdoor_detection", "data"))


def asked_detectors(names: str) -> list[str]:
    """The detectors named with commas between."""
    wanted = names.split(",")
    for name in wanted:
        expect(name in DETECTORS, "--detectors", f"some of {', '.join(DETECTORS)}, with commas between", name)
    return wanted
