"""What the request parser reads right, by phenomenon, and how fast: `python -m benchmarks.parser_reading`.

Sentences of the held-out splits of the phrasebook: other wordings and other names than those trained on; and the same
wordings about everyday objects, whose names are known and of which any two are likelier two than one. Speed in batches
on two threads, for these and for the shorter requests of a generated retrieval split.
"""
from __future__ import annotations

import argparse
import itertools
import os
import random
import re
import time
from collections import Counter
from pathlib import Path

import torch

from data.files import write_json
from data.scenes import retrieval_triplets
from data.sentences import COUNTS, LabelledSentence, labelled_sentence, labelled_sentences, write_request
from retrieval.parser import Modification, Parser, load_parser, split_words
from retrieval.train_parser import compared, true_modification
from submit.records import environment

EMBEDDED = Path("retrieval") / "weights" / "parser"
N, SEED = 10_000, 10_000
TIMED, RUNS, THREADS = 2000, 5, 2
EVERYDAY = (  # the 80 classes of COCO (Lin et al., ECCV 2014)
    "person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat", "traffic light",
    "fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep", "cow", "elephant",
    "bear", "zebra", "giraffe", "backpack", "umbrella", "handbag", "tie", "suitcase", "frisbee", "skis", "snowboard",
    "sports ball", "kite", "baseball bat", "baseball glove", "skateboard", "surfboard", "tennis racket", "bottle",
    "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple", "sandwich", "orange", "broccoli",
    "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch", "potted plant", "bed", "dining table", "toilet",
    "tv", "laptop", "mouse", "remote", "keyboard", "cell phone", "microwave", "oven", "toaster", "sink",
    "refrigerator", "book", "clock", "vase", "scissors", "teddy bear", "hair drier", "toothbrush")
WORDING = {  # first match of the lower-cased text
    "arrow, plus or label": r"[-=]>|[:=|]|(?:^| )[-+] ?\w",
    "substitute": r"substitut",
    "replace, swap, turn into": r"replac|swap|exchang|trad|swit?ch|turn|transform|chang|conver|becom",
    "instead, rather, in place of": r"instead|rather|in place|in lieu|over|prefer|than\b",
    "before, after, once": r"\b(?:before|after|once|when|prior|while|until)\b",
    "no, not, without": r"\b(?:no|not|without|w/o|never|none)\b|n't",
    "two verbs or other": r"",
}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--parser", type=Path, default=EMBEDDED, help="folder of a trained parser")
    options.add_argument("--splits", nargs="+", choices=("val", "test"), default=["val", "test"])
    options.add_argument("--record", default="parser_reading", help="name of the record")
    asked = options.parse_args()
    parser = load_parser(asked.parser, torch.device("cpu"))
    record = {"command": "python -m benchmarks.parser_reading", "parser": str(asked.parser), "n": N, "seed": SEED,
              "megabytes": round(sum(path.stat().st_size for path in asked.parser.iterdir()) / 1e6, 2)}
    for split in asked.splits:
        sentences = labelled_sentences(N, split, generator=torch.Generator().manual_seed(SEED))
        record[split] = reading(parser, sentences)
        show(split, record[split])
        record[f"{split}, everyday names"] = everyday = reading(parser, everyday_sentences(N, split))
        show(f"{split}, everyday names", everyday)
    record["texts_a_second"] = speeds(parser)
    for name, value in record["texts_a_second"].items():
        print(f"{name:58s} {value['texts_a_second']:8.0f} texts a second, {value['tokens']:.1f} sub-words each")
    record |= {"load_average": os.getloadavg()[0], "environment": environment()}  # a busy machine is a slow one
    write_json(Path(__file__).parent / "records" / f"{asked.record}.json", record)


def everyday_sentences(n: int, split: str) -> list[LabelledSentence]:
    """Wordings of the split about everyday objects, as many a side as elsewhere."""
    generator, sentences = torch.Generator().manual_seed(SEED), []
    rng = random.Random(SEED)
    for added, removed in rng.choices([pair for pair in COUNTS if any(pair)],
                                      [weight for pair, weight in COUNTS.items() if any(pair)], k=n):
        names = rng.sample(EVERYDAY, added + removed)
        sentences.append(labelled_sentence(names[:added], names[added:], split=split, generator=generator))
    return sentences


def reading(parser: Parser, sentences: list[LabelledSentence]) -> dict:
    """Figures over all sentences; exact match within every phenomenon; what the misses are."""
    true = [true_modification(sentence) for sentence in sentences]
    found = parser.parse([sentence.text for sentence in sentences])
    right = [compared([a], [b])["exact"] == 100 for a, b in zip(true, found, strict=True)]
    totals, hits = Counter(), Counter()
    for sentence, correct in zip(sentences, right, strict=True):
        for key in phenomena(sentence):
            totals[key] += 1
            hits[key] += correct
    misses = Counter(kind_of_miss(a, b) for a, b, correct in zip(true, found, right, strict=True) if not correct)
    return {**compared(true, found), "misses": dict(misses.most_common()),
            "by_phenomenon": {f"{group}: {value}": {"n": totals[group, value],
                                                    "exact": round(100 * hits[group, value] / totals[group, value], 1)}
                              for group, value in sorted(totals)}}


def phenomena(sentence: LabelledSentence) -> set[tuple[str, str]]:
    """(group, value) pairs that hold for a sentence; one value in most groups."""
    text, spans = sentence.text.lower(), sentence.spans
    names = [text[span.start:span.end] for span in spans]
    sides = [span.side for span in spans]
    rest = "".join(text[a:b] for a, b in zip([0, *(span.end for span in spans)],
                                             [*(span.start for span in spans), len(text)], strict=True))
    found = {("names to add, to remove", f"{sides.count('add')}, {sides.count('remove')}"),
             ("wording", next(name for name, pattern in WORDING.items() if re.search(pattern, rest)))}
    if names:
        found.add(("longest name in words", str(max(len(name.split()) for name in names))))
    if len(set(sides)) == 2:
        found.add(("named first", sides[0]))
    for before, after in itertools.pairwise(spans):
        if before.side == after.side:
            found.add(("list", joint(text[before.end:after.start])))
    for mark, pattern in {"hyphen": "-", "apostrophe": "['’]", "digit": r"\d", "bracket": r"\(",
                          "and, with, of, in": r"\b(?:and|with|of|in|for|on)\b|&"}.items():
        if any(re.search(pattern, name) for name in names):
            found.add(("in a name", mark))
    if sentence.text.isupper():
        found.add(("in a text", "capitals"))
    if text.rstrip().endswith("?"):
        found.add(("in a text", "question"))
    return found


def joint(between: str) -> str:
    """How two names of a side are joined."""
    words = set(re.findall(r"[a-z]+", between))
    if "and" in words:
        return "and"
    return "comma" if "," in between and not words - {"the", "a", "an"} else "another word or mark"


def kind_of_miss(true: Modification, found: Modification) -> str:
    """The coarsest thing that is wrong."""
    a, b = [{name.lower() for name in (*side.add, *side.remove)} for side in (true, found)]
    if a == b:
        return "names right, sides wrong"
    if len(a) != len(b):
        return "more names than there are" if len(b) > len(a) else "fewer names than there are"
    return "as many names, boundaries wrong"


def show(split: str, figures: dict) -> None:
    print(f"{split}: exact {figures['exact']:.2f}, F1 {figures['f1']:.2f}, side wrong {figures['side_wrong']:.2f} "
          f"of {figures['n']}; misses {figures['misses']}")
    for name, value in figures["by_phenomenon"].items():
        print(f"   {name:58s} {value['exact']:6.1f}  of {value['n']}")


def speeds(parser: Parser) -> dict[str, dict[str, float]]:
    """Texts a second of CPU-bound parsing, the best of some runs: other processes only slow it down."""
    generator = torch.Generator().manual_seed(SEED)
    triplets = [t for t in retrieval_triplets(seed=0, queries=TIMED) if t.add or t.remove]
    kinds = {"sentences of the validation split": [
        sentence.text for sentence in labelled_sentences(TIMED, "val", generator=generator)],
        "requests of the generated retrieval split": [
            write_request(t.add, t.remove, split="val", generator=generator) for t in triplets],
        "'add X and remove Y'": [f"add {t.add[0]} and remove {t.remove[0]}" for t in triplets if t.add and t.remove]}
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    try:
        return {f"{kind}, {THREADS} threads": speed(parser, texts) for kind, texts in kinds.items()}
    finally:
        torch.set_num_threads(before)


def speed(parser: Parser, texts: list[str]) -> dict[str, float]:
    encoded = parser.encode([split_words(text) for text in texts])
    seconds = []
    for _ in range(RUNS):
        start = time.perf_counter()
        parser.parse(texts)
        seconds.append(time.perf_counter() - start)
    return {"texts_a_second": len(texts) / min(seconds), "tokens": sum(len(item.ids) for item in encoded) / len(texts)}


if __name__ == "__main__":
    main()
