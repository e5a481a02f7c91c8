"""What work on the networks of a recipe shares: kinds that take about as long as each other, the name of a set."""
from __future__ import annotations

import hashlib
from collections.abc import Sequence

from data.files import fingerprint
from data.image_sets import ImageSet
from data.zoo_recipes import ZooJob

SLOW = ("ssba", "input_aware", "trojannn")  # attacks that train a network of their own first


def job_kind(job: ZooJob) -> str:
    """Networks of a kind take about as long as each other to train."""
    parts = [job.set_name, "adversarial" if job.victim.radius else "", job.attack if job.attack in SLOW else ""]
    return " ".join(part for part in parts if part)


def image_key(halves: Sequence[ImageSet]) -> str:
    """Names the images and labels of a set."""
    tensors = [tensor.contiguous().numpy() for half in halves for tensor in (half.images, half.labels)]
    return fingerprint([tensor.shape for tensor in tensors], [hashlib.sha256(tensor).hexdigest() for tensor in tensors])
