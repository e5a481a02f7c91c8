"""The Hugging Face hub as the kit sees it: which address, whether it may be asked, and its failures in one line."""
from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from data.errors import InputError

ADDRESS = "https://huggingface.co"
YES = {"1", "ON", "YES", "TRUE"}  # as huggingface_hub reads its switches


def endpoint() -> str:
    """Address of the hub: $HF_ENDPOINT, read when asked (the library reads it once, at its import)."""
    return (os.environ.get("HF_ENDPOINT") or ADDRESS).rstrip("/")


def offline() -> bool:
    """Whether $HF_HUB_OFFLINE forbids to ask."""
    return any(os.environ.get(name, "").upper() in YES for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"))


@contextmanager
def asking(what: str, mend: str) -> Iterator[None]:
    """A failure of the hub in here becomes one line: `what` was asked, why it failed, how to `mend` it."""
    if offline():
        raise InputError(f"{what}: expected to ask {endpoint()}, found HF_HUB_OFFLINE set; {mend}")
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # of httpx, requests or the library itself, by its version
        cause = str(error.__cause__ or "")
        reason = " ".join(f"{error} {'' if cause in str(error) else cause}".split()) or type(error).__name__
        raise InputError(f"{what}: expected an answer of {endpoint()}, found {reason[:300]}; {mend}") from None
