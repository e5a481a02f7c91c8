"""One script a headline figure: `python -m benchmarks.NAME` measures and writes benchmarks/records/NAME.json."""
