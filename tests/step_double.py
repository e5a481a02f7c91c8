"""A step of `benchmarks.full_size` that does as told: `python -m tests.step_double RECORD SECONDS STATUS LEFT`."""
import json
import subprocess
import sys
import time
from pathlib import Path

if __name__ == "__main__":
    record, seconds, status, left = sys.argv[1], float(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    if seconds > 1:  # one that does not end by itself, nor when it is interrupted, with another process
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
        Path(record).with_suffix(".pid").write_text(str(child.pid))
        while True:
            try:
                time.sleep(60)
            except KeyboardInterrupt:
                continue
    time.sleep(seconds)
    if status in (0, 3):
        Path(record).parent.mkdir(parents=True, exist_ok=True)
        Path(record).write_text(json.dumps({"left": left}))
    sys.exit(status)
