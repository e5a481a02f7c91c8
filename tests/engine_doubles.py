"""Work for the engines: importable in any process, and light."""
import os
import signal
import time
from pathlib import Path


def square(x):
    time.sleep(0.02)
    return x * x, os.getpid(), os.environ.get("KIT_DEVICE")


def write_or_die(x, folder):
    """Writes a file named x; the worker that gets 3 first is killed, as by the system when memory ends."""
    died = Path(folder) / "died"
    if x == 3 and not died.exists():
        died.write_text("")
        os.kill(os.getpid(), signal.SIGKILL)
    (Path(folder) / str(x)).write_text(str(x))
    return x


def meet(x, folder, parties):
    """Waits until so many devices were seen at work at once: in vain, if workers share one and another idles."""
    device = os.environ["KIT_DEVICE"]
    (Path(folder) / device).write_text("")
    end = time.monotonic() + 60
    while len(list(Path(folder).glob("cuda*"))) < parties and time.monotonic() < end:
        time.sleep(0.02)
    return os.getpid(), device, len(list(Path(folder).glob("cuda*")))


def visible_gpus(x):
    time.sleep(0.2)
    return os.getpid(), os.environ.get("KIT_DEVICE"), os.environ.get("CUDA_VISIBLE_DEVICES"), os.getcwd()


def die_once(x, folder):
    """As `write_or_die`, and says where it works."""
    write_or_die(x, folder)
    time.sleep(0.1)
    return os.getpid(), os.environ["KIT_DEVICE"]


def write_slowly(x, folder):
    (Path(folder) / str(x)).write_text("")
    time.sleep(0.3)


def always_die(x):
    os.kill(os.getpid(), signal.SIGKILL)


def fail(x):
    raise ValueError(f"piece {x} failed")
