"""Weights from the hub into a cache: one commit, parts kept and gone on with, every file checked."""
from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from huggingface_hub import get_hf_file_metadata, hf_hub_url
from huggingface_hub.file_download import http_get
from huggingface_hub.utils import build_hf_headers

from data.errors import InputError, expect
from data.files import write_json
from submit.dev_splits import ROOT
from submit.hub import asking, endpoint
from submit.weights_registry import Weight

CACHE = ROOT / ".cache" / "weights"
RECORD = "fetched.json"
PART = ".part-"
BLOCK = 1 << 20
AGAIN = "run the same command again where there is a network; what was fetched is kept"


def fetch(weight: Weight, cache: Path, *, say: Callable[[str], None]) -> dict[str, Any]:
    """Get the files of `weight` that `cache` lacks; returns the record that stands beside them.

    All are of the one commit that the first answer names. Errors: no network or not allowed; a file that is not there;
    one that comes out with another size or checksum than the hub states.
    """
    expect(not weight.embedded, "NAME", "weights of the hub", f"{weight.name}, which lies in {weight.source}")
    known = fetched(weight, cache)
    if known is not None:
        say(f"{weight.name}: fetched already, commit {known['commit']}")
        return known
    folder, revision, files = cache / weight.name, weight.revision, {}
    for name in weight.files:
        files[name], revision = _fetch_file(weight, name, revision, folder, say)
    record = {"repo": weight.repo, "revision": weight.revision, "commit": revision, "files": files}
    write_json(folder / RECORD, record)
    return record


def fetched(weight: Weight, cache: Path) -> dict[str, Any] | None:
    """The record of weights that lie whole in `cache`; None where they do not, or came from elsewhere."""
    try:
        record = json.loads((cache / weight.name / RECORD).read_text(encoding="utf-8"))
        asked = (weight.repo, weight.revision, weight.files)
        same = (record["repo"], record["revision"], tuple(record["files"])) == asked
        whole = all((cache / weight.name / name).stat().st_size == file["bytes"]
                    for name, file in record["files"].items())
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return record if same and whole else None


def _fetch_file(weight: Weight, name: str, revision: str, folder: Path, say: Callable[[str], None]
                ) -> tuple[dict[str, Any], str]:
    """Size and checksum of one file, now in `folder`, and the commit it is of."""
    what, target = f"{weight.repo}/{name}@{revision}", folder / name
    with asking(what, AGAIN):
        url = hf_hub_url(weight.repo, name, revision=revision, endpoint=endpoint())
        stated = get_hf_file_metadata(url, token=None)
        headers = build_hf_headers()
    expect(stated.commit_hash and stated.etag and stated.size, what, "commit, checksum and size of the file",
           "an answer without them")
    part = folder / f"{name}{PART}{stated.etag[:16]}"
    if not target.is_file() or target.stat().st_size != stated.size or not _right(target, stated.etag):
        part.parent.mkdir(parents=True, exist_ok=True)
        with asking(what, AGAIN), part.open("ab") as file:
            say(f"{what}: {stated.size / 1e6:.1f} MB" + (f", {file.tell() / 1e6:.1f} there" if file.tell() else ""))
            http_get(url, file, resume_size=file.tell(), headers=headers, expected_size=stated.size)
        if not _right(part, stated.etag):
            part.unlink()
            raise InputError(f"{what}: expected the checksum {stated.etag}, found another; {AGAIN}")
        part.replace(target)
    return {"bytes": stated.size, "sha256": sha256(target)}, stated.commit_hash


def _right(path: Path, etag: str) -> bool:
    """Whether a file has the checksum that the hub names: SHA-256 of large files, git's of small ones."""
    if len(etag) == 64:
        return sha256(path) == etag
    if len(etag) == 40:
        return hashlib.sha1(b"blob %d\0" % path.stat().st_size + path.read_bytes()).hexdigest() == etag
    return True  # of no kind we know; the size was right


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()
