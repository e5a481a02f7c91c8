"""Top-1 on a retrieval dev split by image alone, text alone and both: `python -m benchmarks.retrieval_baselines`."""
from pathlib import Path

import numpy as np
import torch

from data.files import write_json
from data.images import read_rgb
from data.retrieval_set import read_retrieval_set
from data.scenes import retrieval_triplets, write_retrieval_split
from retrieval.compose import compose
from retrieval.encoder import load_encoder
from retrieval.parser import parse
from retrieval.predict import encode_database, encode_queries
from submit.intervals import share_interval
from submit.records import environment
from submit.scoring import best_matches

QUERIES, SEED = 1000, 0
FOLDER = Path(".cache") / "benchmarks" / f"retrieval-{QUERIES}-seed{SEED}"


def main() -> None:
    if not FOLDER.exists():
        write_retrieval_split(FOLDER, seed=SEED, queries=QUERIES)
    found = read_retrieval_set(FOLDER)
    queries, targets = found.queries, np.array(found.targets)
    triplets = retrieval_triplets(seed=SEED, queries=QUERIES)
    added, removed = [t.add for t in triplets], [t.remove for t in triplets]
    encoder = load_encoder(device=torch.device("cpu"))
    database = encode_database(found.database)
    raw = encoder.encode_images([read_rgb(path) for path in queries["query_image"]])
    text_only = torch.stack([text_direction(encoder, names) for names in added])
    vectors = {
        "query image alone": encode_queries(queries.assign(query_text="")),
        "text alone (added objects, true parse)": text_only.numpy(),
        "composed, predicted parse (as shipped)": encode_queries(queries),
        "composed, true parse": compose(raw, added, removed, encoder.encode_texts).numpy(),
    }
    rows = []
    for name, rows_of in vectors.items():
        correct = best_matches(rows_of, database) == targets
        low, high = share_interval(correct, SEED)
        rows.append({"what": name, "top1": 100 * float(correct.mean()), "interval_95": [low, high]})
        print(f"{name:45s} {rows[-1]['top1']:6.2f}  [{low:.1f}, {high:.1f}]")
    exact = np.mean([same(found_parse, t) for found_parse, t in
                     zip(parse(queries["query_text"].tolist()), triplets, strict=True)])
    print(f"{'requests parsed exactly':45s} {100 * exact:6.2f}")
    write_json(Path(__file__).parent / "records" / "retrieval_baselines.json", {
        "command": "python -m benchmarks.retrieval_baselines", "seed": SEED, "queries": QUERIES,
        "database": len(database), "rows": rows, "requests_parsed_exactly": 100 * float(exact),
        "environment": environment()})


def text_direction(encoder, names: tuple[str, ...]) -> torch.Tensor:
    """Sum of the added objects' embeddings; for a pure removal a fixed direction that says nothing."""
    if not names:
        return torch.ones(encoder.encode_texts(["a photo of a cup."]).shape[1])
    return encoder.encode_texts([f"a photo of a {name}." for name in names]).sum(0)


def same(found, triplet) -> bool:
    return all({name.lower() for name in a} == {name.lower() for name in b}
               for a, b in ((found.add, triplet.add), (found.remove, triplet.remove)))


if __name__ == "__main__":
    main()
