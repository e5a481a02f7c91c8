"""Packages that hang, crash, fork, fill the disk, call home or write elsewhere: each is held, named and gone after."""
import json
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from submit import sandbox
from submit.cli import main
from submit.judge_run import Judge, run_submission
from submit.rules import rules
from submit.sandbox import TIERS, Access, Ending, best_tier, make_box, run_boxed
from submit.submission import read_submission
from submit.task_retrieval import read_embeddings

WORKING = [tier for tier in TIERS if sandbox._works(tier)]
CONTAINED = [tier for tier in WORKING if tier != "audit"]  # by the kernel, not by Python
LIMITS = replace(rules("anomaly").limits, seconds=20, memory_gib=1, processes=50, written_bytes=10**7)


@pytest.fixture(params=WORKING)
def boxed(request, tmp_path):
    return runner(tmp_path, request.param)


@pytest.fixture
def quickly(tmp_path):
    """In the best tier alone."""
    return runner(tmp_path, best_tier())


def runner(tmp_path, tier):
    """`run(program, access, **limits)`: its ending, after a Python program ran as a package's main.py."""
    def run(program, access=None, command=None, **limits):
        access = access or Access()
        package = tmp_path / "package"
        package.mkdir()
        (package / "main.py").write_text(program)
        run.box = make_box(tmp_path / "box", package, access)
        return run_boxed(command or [sys.executable, "main.py"], run.box, access, replace(LIMITS, **limits), tier=tier,
                         python=sys.executable, environment={"MARK": str(tmp_path)})
    run.tier = tier
    return run


def survivors(tmp_path):
    """Processes that still carry the mark of this test in their environment."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            found += [folder.name] if f"MARK={tmp_path}".encode() in (folder / "environ").read_bytes() else []
        except OSError:
            continue
    return found


def named(ending, kind):
    return [(Path(event.what.split(" ")[-1]).name, event.line) for event in ending.events if event.kind == kind]


def test_a_program_that_ends_well(boxed):
    ending = boxed("print('x')\n")
    assert (ending.ended, ending.status, ending.left_running, ending.events) == ("exit", 0, 0, ())
    assert ending.watched == 1 and ending.peak_processes >= 0 and ending.seconds < 20


def test_a_program_that_fails(boxed):
    ending = boxed("raise ValueError('no')\n")
    assert (ending.ended, ending.status) == ("exit", 1) and ending.errors.endswith("ValueError: no\n")


def test_a_hanging_program_is_ended_even_if_it_ignores_signals(boxed, tmp_path):
    ending = boxed("import signal, time\nfor s in (1, 2, 15, 20): signal.signal(s, signal.SIG_IGN)\n"
                   "while True: time.sleep(9)\n", seconds=1)
    assert ending.ended == "seconds" and 1 <= ending.seconds < 15 and not survivors(tmp_path)


def test_a_process_that_hides_in_another_session_is_ended(boxed, tmp_path):
    ending = boxed("import os, time\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0: time.sleep(99)\n"
                   "    os._exit(0)\ntime.sleep(0.3)\n")
    assert ending.ended == "exit" and ending.status == 0 and not survivors(tmp_path)
    assert ending.left_running == (1 if boxed.tier == "audit" else 0)  # namespaces end with their first process


def test_a_forking_program_is_ended(boxed, tmp_path):
    program = "import os, time\nfor _ in range(30):\n    if os.fork() == 0:\n        time.sleep(99)\ntime.sleep(99)\n"
    ending = boxed(program, processes=12)
    assert ending.ended == "processes" and ending.peak_processes > 12 and not survivors(tmp_path)
    assert [line for _, line in named(ending, "process")] == ["main.py:3"]


def test_a_script_that_forks_is_ended(quickly, tmp_path):
    ending = quickly("", command=["sh", "-c", "for i in 1 2 3 4 5 6 7 8 9 10 11 12 13 14; do sleep 99 & done; wait"],
                     processes=9)
    assert ending.ended == "processes" and not survivors(tmp_path)


@pytest.mark.parametrize("gpu", [False, True])
def test_a_program_that_takes_too_much_memory(quickly, monkeypatch, gpu):
    """Without a GPU its addresses are limited, too; with one only what it really takes."""
    monkeypatch.setattr(sandbox, "_has_gpu", lambda: gpu)
    ending = quickly("import time\nblock = bytearray(400 * 2**20)\ntime.sleep(9)\n", memory_gib=0.25)
    if gpu:
        assert ending.ended == "memory_bytes" and ending.peak_bytes > 2**28
    else:
        assert ending.status == 1 and ending.errors.endswith("MemoryError\n")


def test_a_disk_filling_program_is_ended(boxed):
    ending = boxed("import os\nfor i in range(400):\n    with open(os.environ['TMPDIR'] + f'/{i}', 'wb') as file:\n"
                   "        file.write(bytes(10**6))\nwhile True: pass\n")
    assert ending.ended == "written_bytes" and ending.written_bytes > 10**7


def test_a_flood_of_output_is_ended(quickly):
    ending = quickly("", command=["sh", "-c", "yes"], seconds=30)
    assert ending.ended == "written_bytes" or ending.status != 0
    assert ending.ended != "written_bytes" or ending.written_bytes > 10**7  # bug: 0 bytes met the limit
    assert (quickly.box.logs / "stdout").stat().st_size < 10**9


def test_calls_to_the_network_are_denied_and_named(boxed):
    ending = boxed("import socket\nimport urllib.request\n\n\ndef call():\n    urllib.request.urlopen('http://a.b')\n\n\n"
                   "try:\n    call()\nexcept OSError as error:\n    print(error)\n"
                   "try:\n    socket.create_connection(('127.0.0.1', 9))\nexcept OSError:\n    pass\n"
                   "with socket.socket() as own:\n    own.bind(('127.0.0.1', 0))\n")
    assert ending.status == 0
    found = [(event.what.split(" ")[0], event.line, event.denied) for event in ending.events]
    assert found == [("socket.getaddrinfo", "main.py:6", True), ("socket.getaddrinfo", "main.py:14", True)]


def test_services_of_the_machine_are_not_reached(boxed, tmp_path):
    """They listen on sockets in the file system, which no read-only mount closes; the program's own are left to it."""
    (tmp_path / "machine").mkdir()
    with socket.socket(socket.AF_UNIX) as service:
        service.bind(str(tmp_path / "machine" / "agent"))
        service.listen()
        ending = boxed(f"""import os, socket
socket.socket(socket.AF_UNIX).bind(os.environ["TMPDIR"] + "/own")
own, other = socket.socket(socket.AF_UNIX), socket.socket(socket.AF_UNIX)
own.bind(os.environ["TMPDIR"] + "/one")
own.listen()
other.connect(os.environ["TMPDIR"] + "/one")
try:
    socket.socket(socket.AF_UNIX).connect({str(tmp_path / "machine" / "agent")!r})
except PermissionError:
    pass
""")
    assert (ending.status, ending.errors) == (0, "")
    assert named(ending, "network") == [("agent", "main.py:8")] and ending.events[0].denied


@pytest.mark.parametrize("tier", CONTAINED)
def test_the_folder_of_services_is_empty(tmp_path, tier):
    run = runner(tmp_path, tier)
    ending = run("", command=["/bin/sh", "-c", "test -z \"$(ls -A /run)\""])
    assert ending.status == (0 if Path("/run").is_dir() else 2)
    assert sandbox._covered(["/run/me/python"]) == [] and sandbox._covered(["/usr/bin/python"]) == (
        ["/run"] if Path("/run").is_dir() else [])


@pytest.mark.parametrize("tier", CONTAINED)
def test_programs_without_hooks_have_no_network_and_write_nowhere(tmp_path, tier):
    """Native code does not ask Python: here the kernel has to say no."""
    (tmp_path / "readable").write_text("here")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        program = (f"import socket, os\ntry:\n    socket.create_connection(('127.0.0.1', {port}), 2)\n"
                   "    print('out')\n"
                   f"except OSError:\n    print('held')\nprint(open('{tmp_path}/readable').read())\n"
                   f"for path in ('{tmp_path}/outside', '/tmp/kit-outside', 'inside', '/dev/shm/x', '/root/x'):\n"
                   "    try:\n        open(path, 'w')\n        print('wrote', path)\n"
                   "    except OSError:\n        print('no')\n"
                   "print(len([p for p in os.listdir('/proc') if p.isdigit()]) < 9)\n")
        run = runner(tmp_path, tier)
        ending = run(program, command=[sys.executable, "-I", "main.py"])
    out = (run.box.logs / "stdout").read_text().splitlines()
    assert ending.status == 0, ending.errors
    assert out == ["held", "here", "no", "no", "no", "wrote /dev/shm/x", "no", "True"]
    assert ending.watched == 0 and not (tmp_path / "outside").exists() and not Path("/dev/shm/x").exists()


@pytest.mark.parametrize("tier", CONTAINED)
def test_what_is_closed_cannot_be_opened_again(tmp_path, tier):
    run = runner(tmp_path, tier)
    run("", command=["sh", "-c", "mount -o remount,rw / && echo again; umount -l /proc && echo gone; "
                     "unshare -rm mount -o remount,rw,bind / && touch /kit-outside && echo nested; true"])
    assert (run.box.logs / "stdout").read_text() == "" and not Path("/kit-outside").exists()


def test_writing_elsewhere_is_denied_and_named(boxed, tmp_path):
    (tmp_path / "mine").write_text("x")
    program = ("import os\nfrom pathlib import Path\n\n\ndef tried(work):\n    try:\n        work()\n"
               "    except PermissionError:\n        pass\n    else:\n        print('done')\n\n\n"
               f"tried(lambda: Path('{tmp_path}/out').write_text(''))\ntried(lambda: os.remove('{tmp_path}/mine'))\n"
               "tried(lambda: os.rename('main.py', 'b.py'))\ntried(lambda: os.mkdir('new'))\n"
               f"tried(lambda: os.open('{tmp_path}/o', os.O_CREAT | os.O_WRONLY))\n"
               f"tried(lambda: os.symlink('x', '{tmp_path}/link'))\n"
               f"os.symlink('{tmp_path}', 'output/way')\n"
               "tried(lambda: Path('output/way/far').touch())\nos.remove('output/way')\n"
               "Path('output/fine').write_text('')\nPath(os.environ['TMPDIR'], 'fine').write_text('')\n")
    ending = boxed(program, Access(output=("output",)))
    assert ending.status == 0 and (boxed.box.logs / "stdout").read_text() == "", ending.errors
    denied = {event.line for event in ending.events if event.kind == "write" and event.denied}
    assert denied == {f"main.py:{line}" for line in (14, 15, 16, 17, 18, 19, 21)}
    assert {"main.py", "new"} <= {event.what for event in ending.events}  # as the package names them, not in the box
    assert not (tmp_path / "out").exists() and (tmp_path / "mine").exists() and (boxed.box.package / "main.py").exists()
    assert (boxed.box.package / "output" / "fine").exists()


def test_reading_elsewhere_and_the_truth_is_named(quickly, tmp_path):
    data = tmp_path / "data"
    for name in ("nut/test/a.png", "nut/ground_truth/a.png", "secret"):
        (data / name).parent.mkdir(parents=True, exist_ok=True)
        (data / name).write_text(name)
    program = (f"import json, zipfile\nopen('{data}/nut/test/a.png')\nopen('{data}/nut/ground_truth/a.png')\n"
               "open('main.py')\nopen('/etc/hostname')\n"
               f"open('{tmp_path}/package/main.py')\n")
    ending = quickly(program, Access(given=(data / "nut",), hidden=("ground_truth",)))
    assert named(ending, "truth") == [("a.png", "main.py:3")]
    assert named(ending, "read") == [("main.py", "main.py:6")]


def test_a_package_without_file_access_is_told_each_file(quickly, tmp_path):
    (tmp_path / "given").mkdir()
    (tmp_path / "given" / "a.jpg").touch()
    program = (f"import helper\nimport tempfile\nopen('{tmp_path}/given/a.jpg')\nopen('table.json')\n"
               "tempfile.TemporaryFile()\n")
    package = tmp_path / "package"
    package.mkdir()
    for name, text in (("main.py", program), ("helper.py", "import json\n"), ("table.json", "{}")):
        (package / name).write_text(text)
    access = Access(given=(tmp_path / "given",), file_access=False)
    box = make_box(tmp_path / "box", package, access)
    ending = run_boxed([sys.executable, "main.py"], box, access, LIMITS, tier=best_tier(), python=sys.executable,
                       environment={})
    assert ending.status == 0, ending.errors
    assert named(ending, "read") == [("table.json", "main.py:4")]
    assert {line for _, line in named(ending, "output")} == {"main.py:5"}


def test_what_a_library_does_while_it_is_imported_is_not_the_packages_doing(quickly):
    """Bug: a cache folder that a library made on import was laid to the line that imports it."""
    library = "import tempfile, os\nos.mkdir(tempfile.gettempdir() + '/cache')\n"
    program = ("import os, sys\nfolder = os.environ['TMPDIR'] + '/lib'\nsys.path.insert(0, folder)\nos.mkdir(folder)\n"
               f"with open(folder + '/lib_of_others.py', 'w') as file:\n    file.write({library!r})\n"
               "import lib_of_others\n")
    ending = quickly(program, Access(file_access=False))
    assert ending.status == 0, ending.errors
    assert sorted(named(ending, "output")) == [("lib", "main.py:4"), ("lib_of_others.py", "main.py:5")]


def test_the_environment_is_the_judges(quickly, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_TOKEN", "secret")
    monkeypatch.setenv("KIT_DEVICE", "cpu")
    quickly("import json, os, sys\nprint(json.dumps([dict(os.environ), sys.path]))\n")
    seen, path = json.loads((quickly.box.logs / "stdout").read_text())
    assert not {"HF_TOKEN", "KIT_DEVICE", "USER"} & seen.keys()
    assert seen["HOME"].startswith(str(tmp_path / "box")) and seen["TMPDIR"].startswith(str(tmp_path / "box"))
    assert str(sandbox.BOX) not in path  # its modules are not the package's


def test_other_programs_of_python_are_watched_too(quickly):
    ending = quickly("import subprocess, sys\nsubprocess.run([sys.executable, '-c', 'open(\"/nowhere/x\", \"w\")'])\n")
    assert ending.watched == 2 and [event.line for event in ending.events if event.kind == "process"] == ["main.py:2"]
    assert [(event.what, event.line) for event in ending.events if event.kind == "write"] == [("/nowhere/x", "")]


def test_forged_events_are_left_out(quickly):
    ending = quickly("import os\npath = os.environ['KIT_BOX'].replace('watch.json', 'logs/events.jsonl')\n"
                     "with open(path, 'a') as file:\n"
                     "    file.write('[]\\n{\\n' + '[' * 100000 + '\\n{\"kind\": 1}\\n')\n")
    assert ending.status == 0 and {event.kind for event in ending.events} == {"output"}


def test_what_cannot_be_started_is_said(tmp_path):
    ending = runner(tmp_path, "audit")("", command=["./none.sh"])
    assert ending.ended == "start" and "No such file or directory: './none.sh'" in ending.errors


def test_an_interrupted_run_leaves_no_process(tmp_path):
    """Ctrl-C, or the end of the kit itself: the supervisor ends what it started."""
    (tmp_path / "package").mkdir()
    program = ("import os, sys\nfrom pathlib import Path\nfrom submit import sandbox\nfrom submit.rules import Limits\n"
               "sandbox._free_memory = lambda: 2**32\n"
               f"box = sandbox.make_box(Path({str(tmp_path / 'box')!r}), Path({str(tmp_path / 'package')!r}), "
               "sandbox.Access())\nsandbox.run_boxed(['sleep', '99'], box, sandbox.Access(), Limits(1, 50, 10**6), "
               f"tier={best_tier()!r}, python=sys.executable, environment={{'MARK': {str(tmp_path)!r}}})\n")
    process = subprocess.Popen([sys.executable, "-c", program])
    until = time.monotonic() + 60
    while not survivors(tmp_path) and time.monotonic() < until:
        time.sleep(0.1)
    assert survivors(tmp_path)
    process.send_signal(signal.SIGKILL)
    process.wait()
    while survivors(tmp_path) and time.monotonic() < until:
        time.sleep(0.1)
    assert not survivors(tmp_path)


def test_tiers_that_do_not_work_are_not_taken(monkeypatch, refuses):
    monkeypatch.setattr(sandbox, "_works", lambda tier: tier == "audit")
    assert best_tier() == "audit"
    with refuses(r"--tier: expected one that works here \(audit\), found bubblewrap"):
        best_tier("bubblewrap")
    with refuses(r"--tier: expected auto, bubblewrap, namespaces, audit, found docker"):
        best_tier("docker")


# Whole submissions

SCORER = """import json
from pathlib import Path

for image in sorted(Path("data").glob("*/test/*/*.png")):
    target = Path("output_scores", *image.parts[1:-1], image.stem + "_scores.json")
    target.parent.mkdir(parents=True, exist_ok=True)
    value = float(image.parts[-2] != "good")
    target.write_text(json.dumps({
        "img_level_score": {"__ndarray__": value, "dtype": "float64", "shape": []},
        "pix_level_score": {"__ndarray__": [[[value] * 224] * 112 + [[i / 224] * 224 for i in range(112)]],
                            "dtype": "float64", "shape": [1, 224, 224]}}))
"""


@pytest.fixture
def parts(tmp_path):
    root = tmp_path / "parts" / "nut"
    for kind in ("good", "crack"):
        for number in range(2):
            for folder in ("test", "ground_truth")[:1 + (kind == "crack")]:
                (root / folder / kind).mkdir(parents=True, exist_ok=True)
                Image.fromarray(np.full((8, 8, 3), 200 * (folder == "ground_truth"), np.uint8)).save(
                    root / folder / kind / f"{number}.png")
    return tmp_path / "parts"


@pytest.fixture
def submission(tmp_path):
    def make(program, script="#!/bin/sh\nexec python3 src/score.py\n"):
        folder = tmp_path / "mine"
        (folder / "src").mkdir(parents=True)
        (folder / "src" / "score.py").write_text(program)
        (folder / "run.sh").write_text(script)
        (folder / "run.sh").chmod(0o755)
        return folder
    return make


def judged(folder, data, tmp_path, task="anomaly", **limits):
    package = read_submission(folder, task)
    package = replace(package, rules=replace(package.rules, limits=replace(package.rules.limits, **limits)))
    found = run_submission(package, data, tmp_path / "kept", Judge(best_tier()))
    left = [p for p in (tmp_path / "kept").iterdir() if p.name.startswith(".")]
    assert not left and not survivors(tmp_path)
    return found, [(line.rule, line.text) for line in found.lines if not line.ok]


def test_a_submission_is_run_and_scored(submission, parts, tmp_path, capsys):
    folder = submission(SCORER)
    with pytest.raises(SystemExit) as done:
        main(["run", str(folder), "--data", str(parts), "--task", "anomaly", "--runs", str(tmp_path / "runs")])
    out = capsys.readouterr().out.splitlines()
    assert not done.value.code, out
    assert any("score           mean of seven, % " in line and "4 images" in line for line in out)
    assert out[0].startswith("ok      box             ") and best_tier() in sandbox.MEANING
    record = json.loads(next((tmp_path / "runs").glob("*/record.json")).read_text())
    assert record["judge"]["tier"] == best_tier() and record["results"][0]["parts"][0]["image_auroc"] == 100
    assert {line["rule"] for line in record["judge"]["verdicts"]} >= {"time", "memory", "network", "score"}
    assert not (folder / "output_scores").exists()  # it worked on a copy


def test_data_may_be_links_to_a_store(submission, parts, tmp_path):
    """What `score` follows is no breach; the masks are hidden wherever they lie."""
    (tmp_path / "store").mkdir()
    for kind in ("test", "ground_truth"):
        (parts / "nut" / kind).rename(tmp_path / "store" / f"{kind}-of-nut")
        (parts / "nut" / kind).symlink_to(tmp_path / "store" / f"{kind}-of-nut")
    reading = "for path in sorted(Path('data/nut/test').glob('*/*')):\n    path.read_bytes()\n"
    spying = "for path in sorted(Path('data/nut/ground_truth').glob('*/*')):\n    path.read_bytes()\n"
    assert judged(submission("from pathlib import Path\n" + SCORER + reading), parts, tmp_path)[1] == []
    shutil.rmtree(tmp_path / "mine")
    broken = judged(submission("from pathlib import Path\n" + SCORER + spying), parts, tmp_path)[1]
    assert {rule for rule, _ in broken} == {"reads the truth"}


def test_reading_the_masks_breaks_the_rules(submission, parts, tmp_path):
    program = SCORER + "open('data/nut/ground_truth/crack/0.png', 'rb')\n"
    _, broken = judged(submission(program), parts, tmp_path)
    assert broken == [("reads the truth", f"src/score.py:12: {parts}/nut/ground_truth/crack/0.png")]


def test_scores_that_lay_there_before_do_not_count(submission, parts, tmp_path):
    folder = submission("", "#!/bin/sh\nexit 0\n")
    shutil.copytree(parts, folder / "output_scores")
    (folder / "output_scores" / "old_scores.json").write_text("{}")
    _, broken = judged(folder, parts, tmp_path)
    assert any(rule == "score" for rule, _ in broken)


def test_missing_and_linked_scores_are_named(submission, parts, tmp_path):
    (tmp_path / "secret_scores.json").write_text("{}")
    program = SCORER + (f"import os\nos.remove('output_scores/nut/test/good/0_scores.json')\n"
                        f"os.symlink('{tmp_path}/secret_scores.json', 'output_scores/nut/test/good/0_scores.json')\n")
    found, broken = judged(submission(program), parts, tmp_path)
    assert found.result is None and [rule for rule, _ in broken][-1] == "score"
    assert "0_scores.json: expected a score file, found No such file" in broken[-1][1]


@pytest.mark.parametrize(("script", "limits", "rule", "text"), [
    ("#!/bin/sh\nexit 3\n", {}, "answers", "run.sh: ended with exit status 3"),
    ("#!/bin/sh\nsleep 99\n", {"seconds": 1}, "time", "limit 1"),
    ("#!/bin/sh\nfor i in 1 2 3 4 5 6 7 8 9 10 11 12; do sleep 99 & done\nwait\n", {"processes": 8}, "processes",
     "limit 8"),
    ("#!/bin/sh\nhead -c 9000000 /dev/zero > output_scores/x\nsleep 99\n", {"written_bytes": 10**6}, "disk",
     "limit 1000000"),
    ("no script", {}, "answers", "run.sh: "),
    ("#!/bin/sh\n\nno-such-program\n", {}, "answers", "run.sh: ended with exit status 127: ./run.sh: "),
    ("#!/bin/sh\nno-such-program\nexit 0\n", {}, "answers",
     "run.sh: wrote no scores, ended with exit status 0: ./run.sh: "),
    ("#!/bin/sh\nno-such-program\n", {}, "answers", "no-such-program: "),
    ("#!/usr/bin/env python3\nimport no_such_library\n", {}, "answers", "No module named 'no_such_library'"),
    ("#!/bin/sh\nexec python3 src/none.py\n", {}, "answers", "can't open file 'src/none.py'"),
])
def test_scripts_that_go_wrong_end_in_a_verdict(submission, parts, tmp_path, script, limits, rule, text):
    _, broken = judged(submission("", script), parts, tmp_path, **limits)
    assert any(rule == r and text in t for r, t in broken), broken
    assert any(r == "score" and "no such file" in t.lower() and t.count(str(tmp_path)) == 1 for r, t in broken)


@pytest.mark.parametrize("tier", WORKING)
def test_a_script_that_dies_of_a_signal_is_told(submission, parts, tmp_path, tier):
    """Bug: as the first process of its namespaces it was not ended by its own signal."""
    package = read_submission(submission("", "#!/bin/sh\nkill -SEGV $$\nexit 0\n"), "anomaly")
    found = run_submission(package, parts, tmp_path / "kept", Judge(tier))
    (said,) = [line.text for line in found.lines if line.rule == "answers"]
    assert said in ("run.sh: ended with signal 11 (SIGSEGV)", "run.sh: ended with exit status 139 (SIGSEGV)")


def test_a_script_that_is_not_there_is_named(submission, parts, tmp_path):
    folder = submission("")
    (folder / "run.sh").unlink()
    _, broken = judged(folder, parts, tmp_path)
    assert broken[0] == ("answers", "run.sh: expected a script, found no such file")


@pytest.mark.parametrize("tier", WORKING)
@pytest.mark.parametrize("first", ["#!/no/such/sh", "#! \tpython3 -u", "#!/bin/sh\r"])
def test_a_script_whose_interpreter_is_missing_is_named(submission, parts, tmp_path, first, tier):
    """Bug: the kernel says that the script is missing, or nothing of what is; with hooks alone no line said it."""
    package = read_submission(submission("", f"{first}\nexit 0\n"), "anomaly")
    found = run_submission(package, parts, tmp_path / "kept", Judge(tier))
    said = [line.text for line in found.lines if line.rule == "answers"]
    assert said == [f"run.sh: line 1: expected #! and a program that exists, found {first!r}"]


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_interrupted_command_leaves_no_folder(submission, parts, tmp_path, monkeypatch, capsys, kind):
    """Bugs: the empty folder of its predictions stayed; after SIGTERM, as `timeout` sends it, the whole box."""
    def interrupted(spec):
        assert list((tmp_path / "runs").glob("*-run/predictions/anomaly/.box-*"))
        signal.raise_signal(kind)

    before = signal.getsignal(kind)
    if before is signal.SIG_IGN:
        pytest.skip("ignored by who started the tests, as nohup does, and so by the command")
    monkeypatch.setattr(sandbox, "_supervise", interrupted)
    with pytest.raises(SystemExit) as done:
        main(["run", str(submission("")), "--data", str(parts), "--task", "anomaly", "--tier", "audit",
              "--runs", str(tmp_path / "runs")])
    assert done.value.code == 130 and "interrupted" in capsys.readouterr().err
    assert list((tmp_path / "runs").iterdir()) == [] and signal.getsignal(kind) is before


def some_models(tmp_path, count):
    zoo = Path("data/zoos/tiny")
    names = sorted(p.name for p in zoo.iterdir() if (p / "model.pt").exists())[:count]
    for name in names:
        shutil.copytree(zoo / name, tmp_path / "zoo" / name)
    return names, tmp_path / "zoo"


def test_folders_may_be_relative(tmp_path, monkeypatch):
    some_models(tmp_path, 1)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "main.py").write_text("def backdoor_model_detector(model, num_classes, "
                                               "test_images_folder_address, transformation):\n    return 1\n")
    monkeypatch.chdir(tmp_path)
    package = read_submission(Path("mine"), "backdoor")
    found = run_submission(package, Path("zoo"), Path("kept"), Judge(best_tier()))
    assert found.result.n == 1 and all(line.ok for line in found.lines)


def test_a_package_that_cannot_be_imported_is_named_with_file_and_line(tmp_path):
    """Bug: of a backdoor package only the exception was said."""
    names, zoo = some_models(tmp_path, 2)
    (tmp_path / "mine" / "nets").mkdir(parents=True)
    (tmp_path / "mine" / "main.py").write_text("import os\nimport nets.small\n")
    (tmp_path / "mine" / "nets" / "small.py").write_text("\n\nimport no_such_library\n")
    found, broken = judged(tmp_path / "mine", zoo, tmp_path, "backdoor")
    reason = "import: nets/small.py:3: ModuleNotFoundError: No module named 'no_such_library'"
    assert broken[:2] == [("answers", f"{name}: {reason}") for name in names] and found.result is None


@pytest.mark.parametrize(("files", "expected"), [
    ({"main": "import nets.small\n", "nets/small": "x = 1\n1 / 0\n"},
     "nets/small.py:2: ZeroDivisionError: division by zero"),
    ({"main": "import importlib\n\nimportlib.import_module('no_such')\n"},
     "main.py:3: ModuleNotFoundError: No module named 'no_such'"),
    ({"main": "import nets.small\n", "nets/small": "x = 1\nx = = 2\n"}, "nets/small.py:2: SyntaxError: invalid syntax"),
    ({"main": "exec('1 / 0')\n"}, "main.py:1: ZeroDivisionError: division by zero"),
    ({"main": "import json\n\njson.loads('[')\n"},
     "main.py:3: JSONDecodeError: Expecting value: line 1 column 2 (char 1)"),
])
def test_failures_name_the_last_line_of_the_package(tmp_path, files, expected):
    """What came to pass in a library is laid to the line that called it; a file that does not run to itself."""
    for name, text in files.items():
        (tmp_path / f"{name}.py").parent.mkdir(exist_ok=True)
        (tmp_path / f"{name}.py").write_text(text)
    program = ("import sys\nsys.path.insert(0, sys.argv[1])\nfrom call_functions import failure, imported\n"
               "try:\n    imported({'package': sys.argv[2]}, 'main')\n"
               "except BaseException as error:\n    print(failure(error, sys.argv[2]))\n")
    done = subprocess.run([sys.executable, "-c", program, str(sandbox.BOX), str(tmp_path)], cwd=tmp_path, check=True,
                          capture_output=True, text=True)
    assert done.stdout == expected + "\n"


def test_models_that_cannot_be_answered_are_named_and_the_others_are(tmp_path):
    names, zoo = some_models(tmp_path, 3)
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "main.py").write_text(
        "from pathlib import Path\n\n\n"
        "def backdoor_model_detector(model, num_classes, test_images_folder_address, transformation):\n"
        f"    which = {names!r}.index(Path(test_images_folder_address).parent.name)\n"
        "    if which == 1:\n        open('main.py').read()\n        raise RuntimeError('no idea')\n"
        "    import numpy\n    return numpy.array([0, 1]) if which == 2 else int(model.training)\n")
    found, broken = judged(folder, zoo, tmp_path, "backdoor")
    assert ("answers", f"{names[1]}: main.py:8: RuntimeError: no idea") in broken
    assert ("answers", f"{names[2]}: returned array([0, 1]), neither 0 nor 1") in broken
    assert found.result.n == 3 and len(found.result.parts) == 1 and {rule for rule, _ in broken} == {"answers", "score"}
    value = float(next(text for rule, text in broken if rule == "score").split("% ")[1].split()[0])
    assert value == pytest.approx(found.result.value, abs=0.01) and value in (0, pytest.approx(100 / 3, abs=0.01))
    assert found.result.notes == ("2 of 3 models have no answer: the value counts them as wrong",)
    low, high = found.result.interval
    assert low <= found.result.value <= high


@pytest.mark.parametrize(("ended", "calls", "reasons"), [
    ("seconds_per_sample", 2, ["met the limit of seconds_per_sample"]),
    ("exit", 2, ["ended with signal 9 (SIGKILL): Killed"]),
    ("memory_bytes", 1, ["met the limit of memory_bytes", "met the limit of memory_bytes"]),
])
def test_after_a_model_that_was_stopped_the_others_go_on(tmp_path, monkeypatch, ended, calls, reasons):
    """A call that hangs or dies costs one model; one that takes the machine down ends the run."""
    names, zoo = some_models(tmp_path, 3)
    asked = []

    def run(package, box, access, spec, judge):
        asked.append([given["name"] for given in spec["given"]])
        answered = ["0"] if len(asked) == 1 else asked[-1]
        for name in answered:
            (box.answers / f"{name}.json").write_text(json.dumps({"answer": 1, "problem": None, "seconds": 0.5}))
        last = len(asked) == 2
        how = ("exit", 0) if last else (ended, -9)
        return Ending(*how, 1.0, 0, 1, 0, 0, None if last else "1", "Killed", (), 1, 2**30)

    monkeypatch.setattr("submit.judge_run._run_functions", run)
    folder = tmp_path / "mine"
    folder.mkdir()
    found, broken = judged(folder, zoo, tmp_path, "backdoor")
    assert asked == [["0", "1", "2"], ["2"]][:calls]
    assert [text.split(": ", 1)[1] for rule, text in broken if rule == "answers"] == reasons
    over = [text for rule, text in broken if rule == "time a sample"]  # bug: said the time of those that were answered
    assert over == (["more than 60.0 s, limit 60"] if ended == "seconds_per_sample" else [])
    assert len(found.result.parts) == (2 if calls == 2 else 1) and names[0] == found.result.parts[0]["model"]


def test_retrieval_functions_are_called_as_the_judge_calls_them(tmp_path):
    data = tmp_path / "scenes"
    (data / "images").mkdir(parents=True)
    for name in "abc":
        Image.new("RGB", (4, 4)).save(data / "images" / f"{name}.png")
    (data / "q.csv").write_text("query_image,query_text,target_image\na.png,add b,b.png\na.png,add c,c.png\n")
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "generate_embeds.py").write_text(
        "import numpy as np\n\nSEEN = {'b': [1, 0], 'c': [0, 1]}\n\n\ndef encode_queries(df):\n"
        "    assert list(df.columns) == ['query_image', 'query_text']\n"
        "    return np.array([SEEN[text[-1]] for text in df['query_text']])\n\n\ndef encode_database(df):\n"
        "    assert list(df.columns) == ['target_image']\n    open(df['target_image'][0])\n"
        "    return np.array([SEEN[path[-5]] for path in df['target_image']])\n")
    found, broken = judged(folder, data, tmp_path, "retrieval")
    assert not broken and found.result.value == 100 and found.result.n == 2
    (folder / "generate_embeds.py").write_text(f"open('{data}/q.csv')\n\n1 / 0\n")
    found, broken = judged(folder, data, tmp_path, "retrieval")
    assert ("answers", "import: generate_embeds.py:3: ZeroDivisionError: division by zero") in broken
    assert ("reads the truth", f"generate_embeds.py:1: {data}/q.csv") in broken
    (folder / "generate_embeds.py").write_text(
        "import helper\n\n\ndef encode_queries(df):\n    return helper.vectors(df)\n")
    (folder / "helper.py").write_text("import numpy\n\n\ndef vectors(df):\n    return numpy.ones(2) @ numpy.ones(3)\n")
    _, broken = judged(folder, data, tmp_path, "retrieval")
    assert broken[0][1].startswith("encode_queries: helper.py:5: ValueError: matmul: ")
    assert broken[1][1] == ("encode_database: AttributeError: module 'generate_embeds' has no attribute "
                            "'encode_database'")


def test_arrays_that_declare_more_than_they_hold_are_refused(tmp_path, refuses):
    file = tmp_path / "query_embeddings.npy"
    for content in [
        b"\x93NUMPY\x01\x00" + (118).to_bytes(2, "little") + b"{'descr': '<f8', 'fortran_order': False, "
        b"'shape': (99999999999, 9), }".ljust(117) + b"\n", b"\x93NUMPY\x09\x00", b"",
    ]:
        file.write_bytes(content)
        with refuses(r"query_embeddings\.npy: expected a NumPy array of numbers, found"):
            read_embeddings(tmp_path, "query_embeddings")
    np.save(file, np.ones((2, 3)))
    assert np.array_equal(read_embeddings(tmp_path, "query_embeddings"), np.ones((2, 3)))
