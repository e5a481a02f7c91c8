"""`package --push`: a submission's folder to a private repository of the Hugging Face hub."""
from __future__ import annotations

import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi, get_token

from data.errors import InputError, expect
from submit.hub import asking, endpoint
from submit.package import MANIFEST, Choice
from submit.weights_fetching import sha256

NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*", re.ASCII)
AGAIN = "run the same command again: the finished folder is taken as it is"


@dataclass(frozen=True)
class Pushed:
    """Where the submission lies now, and as which commit."""

    repo: str
    url: str
    commit: str
    files: int


def finished(out: Path, task: str, choice: Choice, repo: str) -> bool:
    """Whether `out` holds the finished package already; what a push would fail for is said before any work."""
    expect(NAME.fullmatch(repo), "--push", "ORG/NAME", repo)
    _token(repo)
    if out.exists():
        check_finished(out, task, choice)
    return out.exists()


def push(folder: Path, repo: str) -> Pushed:
    """Make the private repository ORG/NAME hold the files of `folder` and no others, in one commit.

    The token is the one that `hf auth login` stored, or $HF_TOKEN. Errors: no token, no network, a refusal of the hub,
    a repository that everybody can read, or that holds something else than a package.
    """
    with asking(f"--push {repo}", f"{AGAIN}; its token has to be one that may write to {repo.split('/')[0]}"):
        api = HfApi(endpoint=endpoint(), token=_token(repo))
        api.create_repo(repo, private=True, exist_ok=True)
        there = api.model_info(repo)  # one that was there before keeps whom it is for
        expect(there.private, f"--push {repo}", "a private repository", "one that everybody can read")
        files = {file.rfilename for file in there.siblings or ()} - {".gitattributes"}
        expect(not files or MANIFEST in files, f"--push {repo}", "an empty repository, or one with a package in it",
               f"other files: {', '.join(sorted(files)[:3])}")
        made = api.upload_folder(repo_id=repo, folder_path=folder, commit_message="Submission", delete_patterns="*")
    files = sum(path.is_file() for path in folder.rglob("*"))
    return Pushed(repo, f"{endpoint()}/{repo}", made.oid, files)


def _token(repo: str) -> str:
    token = get_token()
    expect(token, f"--push {repo}", "a token of the hub", "none; run `hf auth login`, then the same command again")
    return token


def print_pushed(folder: Path, repo: str) -> None:
    """Push and say where to; on stderr, as the record of the package may stand on stdout."""
    done = push(folder, repo)
    print(f"pushed: {done.url}, private, {done.files} files, commit {done.commit}", file=sys.stderr)


def check_finished(folder: Path, task: str, choice: Choice) -> None:
    """Refuse a folder that is not, byte for byte, a package of `task` as the package command left it, made with the
    same options."""
    manifest = folder / MANIFEST
    expect(manifest.is_file(), folder, "a path where nothing lies yet, or a finished package to push", "another folder")
    try:
        stated = json.loads(manifest.read_text(encoding="utf-8"))
        made_for, chosen, sums = stated["task"], stated["chosen"], dict(stated["sha256"])
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{manifest}: expected the list of a package, found {type(error).__name__}: {error}") from None
    expect(made_for == task, manifest, f"a package for {task}", made_for)
    expect(chosen == choice.named(), manifest, f"a package made with {choice.named()}", chosen)
    found = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    odd = sorted((found.keys() ^ sums.keys()) - {MANIFEST})
    expect(not odd, folder, f"the files of its {MANIFEST}", f"more or fewer: {', '.join(odd[:5])}")
    for name, stated_sum in sums.items():
        expect(sha256(found[name]) == stated_sum, found[name], "the file as it was packed", "another content")
