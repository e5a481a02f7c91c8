"""Every backdoor attack by name: its config class and how it poisons a set."""
from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType
from typing import Any

from data import badnets, blended, input_aware, low_frequency, sig, ssba, trojannn, wanet
from data.image_sets import ImageSet
from data.poisoned_sets import BackdooredSet
from data.settings import named_config

ATTACKS: dict[str, tuple[ModuleType, type]] = {
    "badnets": (badnets, badnets.BadNetsConfig),
    "blended": (blended, blended.BlendedConfig),
    "sig": (sig, sig.SigConfig),
    "low_frequency": (low_frequency, low_frequency.LowFrequencyConfig),
    "ssba": (ssba, ssba.SSBAConfig),
    "trojannn": (trojannn, trojannn.TrojanNNConfig),
    "input_aware": (input_aware, input_aware.InputAwareConfig),
    "wanet": (wanet, wanet.WaNetConfig),
}


def attack_config(name: str, parameters: Mapping[str, Any], where: str) -> Any:
    """The attack's frozen config; an unknown attack or parameter, or a wrong type, is named after `where`."""
    return named_config(ATTACKS, name, parameters, where)


def poison(name: str, clean: ImageSet, parameters: Mapping[str, Any], *, ratio: float, target: int,
           seed: int) -> BackdooredSet:
    """The training set `clean` under the attack `name`; ratio is a share of the whole set, in (0, 1]."""
    config = attack_config(name, parameters, "attack")
    return ATTACKS[name][0].poison(clean, config, ratio=ratio, target=target, seed=seed)
