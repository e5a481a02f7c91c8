"""Every rule on a smallest valid package and on that package broken in one place."""
import json
import os
import pickle
import subprocess
import zipfile
from pathlib import Path

import pytest
import torch

from submit.checks import RULES, check, opened
from submit.cli import main
from submit.package import build_package
from submit.rules import TASKS
from submit.submission import Broken, Verdict, plain, read_submission

SMALLEST = {
    "backdoor": {
        "main.py": "import torch\n\n\ndef backdoor_model_detector(model, num_classes, test_images_folder_address, "
                   "transformation) -> int:\n    return 1\n",
        "requirements.txt": "torch==2.4.0\nnumpy==1.26.4\n"},
    "retrieval": {
        "generate_embeds.py": "from model import embed\n\n\ndef encode_queries(df):\n    return embed(df)\n\n\n"
                              "def encode_database(df):\n    return embed(df)\n",
        "model.py": "import numpy as np\n\n\ndef embed(df):\n    return np.ones((len(df), 2))\n",
        "requirements.txt": "torch==2.4.0\nnumpy==1.26.4\n", "weights.pth": b""},
    "anomaly": {
        "run.sh": "#!/bin/sh\npython3 src/go.py\n", "src/go.py": "import numpy\n", "runner.py": "import subprocess\n",
        "requirements.txt": "numpy==1.26.4\nscikit-learn==1.7.2\nscikit-image==0.25.2\ntqdm==4.67.1\n",
        "apt_requirements.txt": "",
        "Dockerfile": "FROM pytorch/pytorch:2.4.1-cuda12.4-cudnn9-runtime\n"},
}


class Call:
    """Pickled, it calls when it is read."""

    def __reduce__(self):
        return os.system, ("true",)


@pytest.fixture
def package(tmp_path):
    def make(task, changes=()):
        for name, content in {**SMALLEST[task], **dict(changes)}.items():
            path = tmp_path / "mine" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if content is not None:
                path.write_bytes(content.encode() if isinstance(content, str) else content)
        if task == "retrieval" and "weights.pth" not in dict(changes):
            torch.save({"w": torch.ones(2)}, tmp_path / "mine" / "weights.pth")
        if task == "anomaly":
            os.chmod(tmp_path / "mine" / "run.sh", 0o755)
        return tmp_path / "mine"
    return make


def breaches(folder, task=None):
    return {verdict.rule: verdict.broken for verdict in check(read_submission(folder, task)) if verdict.broken}


@pytest.mark.parametrize("task", TASKS)
def test_the_smallest_valid_packages_break_nothing(package, task):
    assert breaches(package(task)) == {}
    assert read_submission(package(task), None).task == task


@pytest.mark.parametrize("task", TASKS)
def test_our_own_packages_break_nothing(tmp_path, task):
    made = build_package(task, tmp_path / task, tried=False)
    assert breaches(made.folder) == {}
    with opened(made.archive, None) as unpacked:
        assert unpacked.task == task and not any(v.broken for v in check(unpacked))


MAIN = SMALLEST["backdoor"]["main.py"]


def in_main(*lines):
    """The backdoor package's main.py with these lines in its function, from line 5 on."""
    return {"main.py": MAIN.replace("    return 1\n", "".join(f"    {line}\n" for line in (*lines, "return 1")))}


@pytest.mark.parametrize(("task", "changes", "rule", "where", "found"), [
    ("backdoor", {"big.txt": b"0" * 1_000_001}, "size", "big.txt", "1000001 of them here; limit 1000000"),
    ("backdoor", {"main.py": None, "mine/main.py": MAIN}, "files", "main.py", "only mine/main.py"),
    ("retrieval", {"weights.pth": None}, "files", "weights.pth", "no such file"),
    ("anomaly", {"run.sh": "python3 src/go.py\n"}, "executable", "run.sh:1", "no line that names its interpreter"),
    ("anomaly", {"run.sh": "#!/bin/sh\r\npython3 src/go.py\r\n"}, "executable", "run.sh:1", "Windows line ends"),
    ("anomaly", {"Dockerfile": "# mine\nFROM ubuntu\n"}, "container", "Dockerfile:2", "FROM ubuntu"),
    ("backdoor", {"notes.ipynb": ""}, "unneeded", "notes.ipynb", "does not need"),
    ("backdoor", {"a/__pycache__/x.pyc": "", "a/__pycache__/y.pyc": ""}, "unneeded", "a/__pycache__", "does not need"),
    ("backdoor", {"a/.git/config": ""}, "unneeded", "a/.git", "does not need"),
    ("backdoor", {"idle.py": ""}, "unneeded", "idle.py", "a module that nothing imports"),
    ("anomaly", {"data/__init__.py": ""}, "unneeded", "data", "does not need"),
    ("retrieval", {"weights.pth": pickle.dumps(Call())}, "weights", "weights.pth", "asks for posix.system"),
    ("retrieval", {"weights.pth": b"junk"}, "weights", "weights.pth", "no whole pickle"),
    ("backdoor", {"main.py": MAIN + "\ndef :\n"}, "syntax", "main.py:7", "invalid syntax"),
    ("backdoor", {"main.py": MAIN + "\ntry:\n    pass\nexcept* ValueError:\n    pass\n"}, "syntax", "main.py:",
     "Exception groups are only supported in Python 3.11 and greater"),
    ("backdoor", {"main.py": "\ndef detect(model):\n    return 1\n"}, "functions", "main.py", "no function backdoor_"),
    ("backdoor", {"main.py": MAIN.replace("num_classes, test", "test")}, "functions", "main.py:4",
     "(model, test_images_folder_address, transformation)"),
    ("backdoor", {"main.py": MAIN.replace("ation)", "ation, more)")}, "functions", "main.py:4", "more"),
    ("backdoor", {"main.py": MAIN.replace("ation)", "ation, *, key)")}, "functions", "main.py:4", "key"),
    ("backdoor", {"main.py": MAIN.replace("def ", "async def ")}, "functions", "main.py:4", "(model, num_classes"),
    ("backdoor", in_main("import parts.gone") | {"parts/__init__.py": ""}, "modules", "main.py:5", "no such module"),
    ("backdoor", in_main("import scipy"), "modules", "main.py:5", "in neither the package nor requirements.txt"),
    ("backdoor", in_main("import tomllib"), "modules", "main.py:5", "tomllib, not in Python 3.10.11"),
    ("backdoor", {"random.py": "", "main.py": "import random\n" + MAIN}, "names", "random.py", "like random"),
    ("anomaly", {"requirements.txt": "numpy==1.26.4\nscikit-learn==1.7.2\ntqdm==4.67.1\n"}, "requirements",
     "requirements.txt", "no scikit-image, which the organizers' evaluation imports"),
    ("backdoor", {"requirements.txt": "torch>=2\n"}, "requirements", "requirements.txt:1", "no fixed version"),
    ("backdoor", {"requirements.txt": "# mine\ntorch==2.6.0\n"}, "requirements", ":2", "the judge has 2.4.0"),
    ("backdoor", {"requirements.txt": "torch==2.4.*\n"}, "requirements", ":1", "no fixed version"),
    ("backdoor", {"requirements.txt": "torch==2.4.0\ntorch==2.4.0\n"}, "requirements", ":2", "asked for twice"),
    ("backdoor", {"requirements.txt": "torch==2.4.0\nsklearn==1.0\n"}, "requirements", ":2", "no known library"),
    ("backdoor", {"requirements.txt": "torch==2.4.0\ntorchvison==0.19.0\n"}, "requirements", ":2", "no known library"),
    ("backdoor", {"requirements.txt": "torch==2.4.0\n-r more.txt\n"}, "requirements", ":2", "no name with a version"),
    ("backdoor", {"requirements.txt": "torch==2.4.0\nx @ https://a.b/x.whl\n"}, "requirements", ":2", "no name with"),
    ("retrieval", {"model.py": "\nfrom transformers import LlamaForCausalLM\n" + SMALLEST["retrieval"]["model.py"],
                   "requirements.txt": "torch==2.4.0\nnumpy==1.26.4\ntransformers==4.46.3\n"},
     "models", "model.py:2", "transformers.LlamaForCausalLM, a large language model"),
    ("retrieval", {"model.py": "import numpy as np\nimport torchvision\n\n\ndef embed(df):\n    torchvision.models."
                               "detection.fasterrcnn_resnet50_fpn()\n    return np.ones(2)\n",
                   "requirements.txt": "torch==2.4.0\nnumpy==1.26.4\ntorchvision==0.19.0\n"},
     "models", "model.py:6", "a object detector"),
    ("retrieval", {"net/config.json": '{"architectures": ["Qwen2ForCausalLM"]}'}, "models", "net/config.json",
     "Qwen2ForCausalLM, a large language model"),
    ("backdoor", in_main("import timm", "timm.create_model('resnet18', pretrained=True)")
     | {"requirements.txt": "torch==2.4.0\ntimm==1.0.22\n"}, "downloads", "main.py:6", "pretrained weights"),
    ("backdoor", in_main("from transformers import AutoModel", "AutoModel.from_pretrained('a/b')")
     | {"requirements.txt": "torch==2.4.0\ntransformers==4.46.3\n"}, "downloads", "main.py:6", "fetches 'a/b'"),
    ("backdoor", in_main("import open_clip as c", "c.create_model('ViT-B-32', 'openai')")
     | {"requirements.txt": "torch==2.4.0\nopen_clip_torch==2.32.0\n"}, "downloads", "main.py:6", "weights (openai)"),
    ("backdoor", in_main("torch.hub.load('a', 'b')"), "downloads", "main.py:5", "torch.hub.load fetches files"),
    ("backdoor", in_main("from urllib import request"), "network", "main.py:5", "use of urllib.request"),
    ("backdoor", in_main("import socket as s"), "network", "main.py:5", "use of socket"),
    ("anomaly", {"run.sh": "#!/bin/sh\n# pip install x\npip install x\npython3 src/go.py\n"}, "network", "run.sh:3",
     "use of pip install"),
    ("backdoor", in_main("open('x')"), "file access", "main.py:5", "open reads a file"),
    ("backdoor", in_main("open('x', mode='w')"), "file access", "main.py:5", "open writes a file"),
    ("backdoor", in_main("torch.save(model, 'x')"), "file access", "main.py:5", "torch.save writes a file"),
    ("backdoor", in_main("from pathlib import Path as P", "P('x').read_bytes()"), "file access", "main.py:6", "reads"),
    ("backdoor", in_main("from pathlib import Path as P", "P('x').open('a')"), "file access", "main.py:6", "writes"),
    ("retrieval", {"model.py": "import numpy as np\n\n\ndef embed(df):\n    np.save('x', 1)\n"}, "file access",
     "model.py:5", "numpy.save writes a file"),
    ("backdoor", in_main("A = 1  # tuned", "B = 2  # tuned"), "constants", "main.py:6", "B = 2, one of 2 constants"),
    ("backdoor", in_main("A = 1  # tuned", "P_THRESHOLD = 0.08"), "constants", "main.py:6", "P_THRESHOLD = 0.08"),
    ("backdoor", in_main("X = '/home/me/x.npy'"), "paths", "main.py:5", "'/home/me/x.npy'"),
    ("backdoor", in_main("X = 'C:\\\\x.npy'"), "paths", "main.py:5", "C:"),
    ("anomaly", {"run.sh": "#!/bin/sh\npython3 src/go.py --data=/root/data\n"}, "paths", "run.sh:2", "/root/data"),
])
def test_each_rule_names_what_breaks_it(package, task, changes, rule, where, found):
    broken = breaches(package(task, changes), task)
    assert rule in broken, broken
    assert any(where in b.where and found in b.found and b.mend for b in broken[rule]), broken[rule]
    assert len(broken[rule]) == 1


@pytest.mark.parametrize("changes", [
    in_main("from PIL import Image", "Image.open('x')") | {"requirements.txt": "torch==2.4.0\npillow==11.3.0\n"},
    {"main.py": MAIN + "\n\ndef never_called():\n    open('x')\n"},
    in_main("requests = [model]", "requests.append(1)"),
    in_main("x = 0.5  # fixed by the paper"), in_main("X = '/proc/meminfo'"),
    {"main.py": "from inner.core import backdoor_model_detector\n", "inner/__init__.py": "",
     "inner/core.py": MAIN.replace("transformation)", "transformation, more=0)")},
    in_main("try:", "    import torch.nothing_of_ours", "except ImportError:", "    pass"),
    {"requirements.txt": "torch == 2.4.0  # as there\n\nnumpy==1.26.4 ; python_version >= '3.10'\n"},
])
def test_what_is_allowed_breaks_nothing(package, changes):
    assert breaches(package("backdoor", changes)) == {}


def test_links_out_of_the_package_are_named_and_not_followed(package, tmp_path):
    folder = package("backdoor")
    (tmp_path / "secret").write_text("s")
    (folder / "up").symlink_to("../secret")
    (folder / "far").symlink_to(tmp_path / "secret")
    (folder / "etc").symlink_to("/etc")
    (folder / "loop").symlink_to("loop")
    (folder / "fine").symlink_to("main.py")
    os.mkfifo(folder / "pipe")
    broken = breaches(folder)["links"]
    assert [b.where for b in broken] == ["etc", "far", "loop", "pipe", "up"]
    assert broken[0].found == "a link to /etc" and broken[3].found == "a device, socket or pipe"


def test_a_script_without_permission(package):
    folder = package("anomaly")
    os.chmod(folder / "run.sh", 0o644)
    assert breaches(folder)["executable"] == (Broken("run.sh", "no permission to execute", "chmod +x run.sh"),)


def disguised():
    """Names pushed early, called from the memo: the last two texts in the file look like those of a tensor."""
    text = b"".join(b"\x8c" + bytes([len(w)]) + w.encode() + b"\x94" for w in ("posix", "system", "torch", "Size"))
    return b"\x80\x04" + text + b"h\x00h\x01\x93\x8c\x04true\x85R."


def test_hidden_calls_in_pickles_are_named(package, tmp_path):
    assert pickle.loads(disguised()) == 0  # it does call
    nested = tmp_path / "nested.pth"
    with zipfile.ZipFile(nested, "w") as archive:
        archive.writestr("x/data.pkl", pickle.dumps({}))
        archive.writestr("x/inner.zip", b"")
    loaded = pickle.dumps({"a": 1}) + pickle.dumps(Call())  # a second pickle in one file
    for content, found in [(disguised(), "asks for posix.system"), (nested.read_bytes(), "an archive in an archive"),
                           (loaded, "asks for posix.system"), (b"cbuiltins\neval\n.", "asks for builtins.eval"),
                           (b"\x80\x04\x93.", "put.together"), (b"ctorch.storage\n_load_from_bytes\n.", "_load_from")]:
        folder = package("retrieval", {"weights.pth": content})
        assert found in breaches(folder)["weights"][0].found


def test_a_description_of_no_model_is_left(package):
    assert "models" not in breaches(package("backdoor", {"config.json": '{"architectures": 5}'}))


def test_a_clone_with_weights_beside_the_code_breaks_nothing(package):
    folder = package("retrieval", {
        "model.py": "from pathlib import Path\nimport numpy as np\nimport open_clip\nimport timm\n\n"
                    "WEIGHTS = Path(__file__).parent / 'weights.pth'\n\n\ndef embed(df, pretrained=False):\n"
                    "    open_clip.create_model('ViT-B-32', pretrained=str(WEIGHTS))\n"
                    "    timm.create_model('resnet18', pretrained=pretrained)\n    return np.ones((len(df), 2))\n",
        "requirements.txt": "torch==2.4.0\nnumpy==1.26.4\nopen_clip_torch==2.32.0\ntimm==1.0.22\n",
        ".git/objects/ab": "x" * 100, ".gitattributes": "*.pth filter=lfs\n", ".gitignore": "*.log\n"})
    assert breaches(folder) == {}
    assert not any(".git" in str(path) for path in read_submission(folder, "retrieval").files)
    folder = package("retrieval", {"model.py": "import torchvision\n\n\ndef embed(df):\n    return torchvision.models."
                                               "resnet18(weights=torchvision.models.ResNet18_Weights.DEFAULT)\n",
                                   "requirements.txt": "torch==2.4.0\ntorchvision==0.19.0\n"})
    assert "ResNet18_Weights.DEFAULT" in breaches(folder)["downloads"][0].found


def test_what_torch_and_numpy_save_is_no_breach(package):
    import numpy as np

    folder = package("retrieval")
    state = {"a": torch.ones(3).half(), "b": torch.ones(2, 2).bool(), "c": torch.nn.Parameter(torch.ones(1)), "d": 3}
    torch.save(state, folder / "weights.pth")
    torch.save(state, folder / "old.pth", _use_new_zipfile_serialization=False)
    np.save(folder / "x.npy", np.ones(3))
    (folder / "numbers.pkl").write_bytes(pickle.dumps({"m": np.ones(3), "s": np.float32(2)}))
    assert "weights" not in breaches(folder)
    np.save(folder / "y.npy", np.array([{}], dtype=object), allow_pickle=True)
    assert breaches(folder)["weights"][0].found == "an array of Python objects"
    (folder / "y.npy").unlink()
    np.savez(folder / "z.npz", a=np.ones(3), b=np.array([{}], dtype=object))
    assert breaches(folder)["weights"][0].found == "b.npy: an array of Python objects"
    np.savez_compressed(folder / "z.npz", a=np.arange(1000))
    content = bytearray((folder / "z.npz").read_bytes())
    content[60:90] = b"\xff" * 30
    (folder / "z.npz").write_bytes(content)
    assert breaches(folder)["weights"][0].found.startswith("a file that cannot be read")


def test_source_that_is_too_large_or_no_source_stops_its_own_rules_only(package):
    folder = package("backdoor", {"main.py": b"\xff\xfe\x00" * 10})
    broken = breaches(folder)
    assert {"syntax", "functions", "modules"} <= set(broken) and "size" not in broken
    (folder / "main.py").write_bytes(b"#" * 10_000_001)
    assert breaches(folder)["syntax"][0].where == "main.py:1"


def test_a_rule_for_each_line_and_a_status(package, capsys, tmp_path):
    assert run(capsys, "check", package("backdoor"))[:1] == (0,)
    status, out, _ = run(capsys, "check", package("backdoor", in_main("open('x')")))
    lines = out.splitlines()
    assert status == 1 and len(lines) == len(RULES) + 1 and lines[-1].endswith("mine: backdoor, 18 rules, 1 broken")
    assert "broken  file access   main.py:5: open reads a file; keep it in memory, or in a Python module" in lines
    assert all(line.startswith(("ok      ", "broken  ")) for line in lines[:-1])
    status, out, _ = run(capsys, "check", tmp_path / "mine", "--json")
    record = json.loads(out)
    assert status == 1 and record["broken"] == 1 and [r["rule"] for r in record["rules"]] == list(RULES)


def run(capsys, *arguments):
    with pytest.raises(SystemExit) as done:
        main([str(argument) for argument in arguments])
    return (done.value.code or 0, *capsys.readouterr())


@pytest.mark.parametrize(("name", "message"), [
    ("nowhere", "nowhere: expected a folder of a submission, or its zip, found no such folder"),
    ("empty", "empty: expected the files of one task, found none (--task says which it is)"),
    ("no.zip", "no.zip: expected a whole zip file, found File is not a zip file"),
])
def test_what_is_no_submission_ends_in_one_line(tmp_path, capsys, name, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "no.zip").write_text("x")
    status, out, err = run(capsys, "check", tmp_path / name)
    assert (status, out) == (2, "") and message in err and len(err.splitlines()) == 1


def test_another_contest_has_other_limits(package, tmp_path, capsys):
    folder = tmp_path / "rules"
    folder.mkdir()
    for task in TASKS:
        text = Path("submit/rules", f"{task}.toml").read_text()
        text = text.replace("1_000_000", "10").replace("backdoor_model_detector", "judge")
        (folder / f"{task}.toml").write_text(text)
    status, out, _ = run(capsys, "check", package("backdoor"), "--rules", folder)
    assert status == 1 and "limit 10;" in out and "main.py: no function judge; define it: def judge(model" in out
    assert run(capsys, "check", package("backdoor"))[0] == 0  # and the kit's own hold again


def test_names_of_strangers_stay_on_one_line(package, capsys):
    folder = package("backdoor", {"a\n\x1b[31mb.ipynb": ""})
    _, out, _ = run(capsys, "check", folder)
    assert "a\\n\\x1b[31mb.ipynb: a file that the judge does not need" in out and "\x1b" not in out
    assert plain("ä\u202e") == "ä\\u202e"


def test_pip_is_asked_only_on_request(package, capsys, monkeypatch):
    calls = []

    class Done:
        returncode, stderr = 1, "noise\nERROR: No matching distribution found for torch==2.4.0\n"

    monkeypatch.setattr("submit.check_source.subprocess.run", lambda command, **_: calls.append(command) or Done)
    assert run(capsys, "check", package("backdoor"))[0] == 0 and not calls
    status, out, err = run(capsys, "check", package("backdoor"), "--resolve")
    assert err.startswith("asking pip for the requirements: minutes")
    assert status == 1 and "resolution    requirements.txt: No matching distribution found for torch==2.4.0" in out
    assert calls[0][calls[0].index("--python-version") + 1] == "3.10" and "--dry-run" in calls[0]


def test_pip_that_does_not_answer_is_no_end_of_the_check(package, monkeypatch):
    def late(command, **_):
        raise subprocess.TimeoutExpired(command, 600)

    monkeypatch.setattr("submit.check_source.subprocess.run", late)
    verdict = check(read_submission(package("backdoor"), None), resolve=True)[-1]
    assert verdict.broken == (Broken("requirements.txt", "no answer of pip within 600 s", "ask again later"),)


def test_unknown_libraries_are_said_to_be_unknown(package):
    folder = package("backdoor", {"requirements.txt": "torch==2.4.0\nsome-rare-thing==1.0\n"})
    verdict = next(v for v in check(read_submission(folder, None)) if v.rule == "requirements")
    assert verdict == Verdict("requirements", (), "2 pinned; not known offline, --resolve asks pip: some-rare-thing")
