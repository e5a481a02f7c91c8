"""Run a command under limits; when it ends, or one is reached, end every process that it started.

`python supervise.py SPEC`: JSON with command, folder, environment, limits, watched folders, and where the output,
the heartbeat and the outcome lie. Whatever its processes do - fork, change their session, ignore signals - they stay
below this process, as it adopts orphans, so none is left.
"""
import contextlib
import ctypes
import json
import os
import resource
import signal
import subprocess
import sys
import time

ADOPT_ORPHANS, DIE_WITH_PARENT = 36, 1  # of prctl
TICK = 0.05            # seconds between two looks at the clock
LOOK = 4               # ticks between two looks at processes and files
PAGE = os.sysconf("SC_PAGE_SIZE")
ENDING_SECONDS = 0.3   # that processes have to end by themselves: a namespace does with its first one
LAST_SECONDS = 20      # for ending the others


def main():
    with open(sys.argv[1], encoding="utf-8") as file:
        spec = json.load(file)
    libc = ctypes.CDLL(None)
    libc.prctl(ADOPT_ORPHANS, 1, 0, 0, 0)
    libc.prctl(DIE_WITH_PARENT, signal.SIGTERM, 0, 0, 0)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    nothing = {"seconds": 0.0, "peak_bytes": 0, "peak_processes": 0, "written_bytes": 0, "sample": None}
    outcome = {"ended": "interrupted", "status": None}
    try:
        outcome = watch(spec, start(spec))
    except OSError as error:
        outcome = {"ended": "start", "status": None}
        with open(spec["stderr"], "a", encoding="utf-8") as file:
            file.write(str(error))
    finally:
        outcome = {**nothing, **outcome, "left_running": end_all()}
        outcome["written_bytes"] = max(outcome["written_bytes"], used(spec["watched"]))
        with open(spec["outcome"] + ".part", "w", encoding="utf-8") as file:
            json.dump(outcome, file)
        os.replace(spec["outcome"] + ".part", spec["outcome"])


def start(spec):
    limits = spec["limits"]

    def before():
        os.setsid()
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (limits["our_bytes"], limits["our_bytes"]))
        if limits["data_bytes"]:
            resource.setrlimit(resource.RLIMIT_DATA, (limits["data_bytes"], limits["data_bytes"]))

    with open(spec["stdout"], "wb") as out, open(spec["stderr"], "wb") as err:
        return subprocess.Popen(spec["command"], cwd=spec["folder"], env=spec["environment"], stdin=subprocess.DEVNULL,
                                stdout=out, stderr=err, preexec_fn=before)


def watch(spec, process):
    """Wait until the command ends or a limit is reached."""
    limits, begin, ticks = spec["limits"], time.monotonic(), 0
    found = {"ended": "exit", "status": None, "peak_bytes": 0, "peak_processes": 0, "written_bytes": 0, "sample": None}
    while process.poll() is None:
        now = time.monotonic()
        sample, since = heartbeat(spec["heartbeat"])
        found["sample"] = sample
        if limits["seconds"] is not None and now - begin > limits["seconds"]:
            found["ended"] = "seconds"
        elif sample is not None and limits["seconds_per_sample"] is not None and (
                now - since > limits["seconds_per_sample"]):
            found["ended"] = "seconds_per_sample"
        elif ticks % LOOK == 0:
            measure(spec, found)
        if found["ended"] != "exit":
            break
        ticks += 1
        time.sleep(TICK)
    found["status"] = process.poll()
    found["sample"] = heartbeat(spec["heartbeat"])[0]
    found["seconds"] = time.monotonic() - begin
    return found


def measure(spec, found):
    limits, below = spec["limits"], descendants()
    found["peak_bytes"] = max(found["peak_bytes"], memory(below))
    found["peak_processes"] = max(found["peak_processes"], len(below))
    found["written_bytes"] = max(found["written_bytes"], used(spec["watched"]))
    for name, key in (("peak_bytes", "memory_bytes"), ("peak_processes", "processes"),
                      ("written_bytes", "written_bytes")):
        if found[name] > limits[key]:
            found["ended"] = key
    ours = used(spec["ours"])
    if ours > limits["our_bytes"]:
        found["ended"], found["written_bytes"] = "written_bytes", max(found["written_bytes"], ours)


def heartbeat(path):
    """The sample that is worked on and since when; None between samples."""
    try:
        with open(path, encoding="utf-8") as file:
            sample, since = json.loads(file.read(1000))
        return sample, float(since)
    except (OSError, ValueError, TypeError):
        return None, 0.0


def descendants():
    """All processes below this one, without those that only wait to be reaped."""
    parents = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                with open("/proc/" + name + "/stat", encoding="utf-8", errors="replace") as file:
                    fields = file.read().rpartition(")")[2].split()
            except OSError:
                continue
            if fields[0] != "Z":
                parents[int(name)] = int(fields[1])
    below, rest = {os.getpid()}, True
    while rest:
        rest = {pid for pid, parent in parents.items() if parent in below and pid not in below}
        below |= rest
    return below - {os.getpid()}


def memory(pids):
    """Bytes that are resident, what processes share counted once."""
    private, shared = 0, 0
    for pid in pids:
        try:
            with open(f"/proc/{pid}/statm", encoding="utf-8") as file:
                resident, common = (int(part) * PAGE for part in file.read().split()[1:3])
        except (OSError, ValueError):
            continue
        private, shared = private + resident - common, max(shared, common)
    return private + shared


def used(folders):
    """Bytes on disk below the folders."""
    total, waiting = 0, list(folders)
    while waiting:
        try:
            with os.scandir(waiting.pop()) as entries:
                for entry in entries:
                    if entry.is_dir(follow_symlinks=False):
                        waiting.append(entry.path)
                    else:
                        total += entry.stat(follow_symlinks=False).st_blocks * 512
        except OSError:
            continue
    return total


def end_all():
    """End every process below this one and say how many there were. First all are stopped, so that none forks on."""
    patience = time.monotonic() + ENDING_SECONDS
    while descendants() and time.monotonic() < patience:
        time.sleep(TICK / 2)
    first, until = None, time.monotonic() + LAST_SECONDS
    while time.monotonic() < until:
        below = descendants()
        first = len(below) if first is None else first
        for kind in (signal.SIGSTOP, signal.SIGKILL):
            for pid in below:
                with contextlib.suppress(OSError):
                    os.kill(pid, kind)
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            if not below:
                break
        time.sleep(0.01)
    return first


if __name__ == "__main__":
    main()
