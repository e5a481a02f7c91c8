import re

import pytest

from submit.rules import FOLDER, TASKS, VARIABLE, place, read_rules, rules, use_rules


@pytest.mark.parametrize("task", ["retrieval", "anomaly", "backdoor"])
def test_leaderboards_are_ten_scores_best_first(task):
    board = rules(task).leaderboard
    assert len(board) == 10 and list(board) == sorted(board, reverse=True)


def test_place():
    board = (90.0, 80.0, 70.0)
    assert [place(v, board) for v in (95, 90, 85, 70, 69)] == [1, 1, 2, 3, None]


def test_weights_of_the_anomaly_score():
    assert sum(rules("anomaly").weights.values()) == pytest.approx(8.4)


def second_contest(tmp_path, **replaced):
    text = (FOLDER / "backdoor.toml").read_text()
    for old, new in replaced.items():
        text = re.sub(rf"(?m)^{old} = .*$", new, text)
    (tmp_path / "backdoor.toml").write_text(text)
    return tmp_path


def test_another_contest_is_another_folder(tmp_path, monkeypatch):
    monkeypatch.setenv(VARIABLE, "")
    use_rules(second_contest(tmp_path, package_bytes="package_bytes = 5", seconds_per_sample="seconds = 9"))
    assert (rules("backdoor").limits.package_bytes, rules("backdoor").limits.seconds) == (5, 9)
    assert rules("backdoor").limits.seconds_per_sample is None
    use_rules(None)
    assert rules("backdoor").limits.seconds_per_sample == 60


def test_limits_are_those_of_the_organizers():
    found = {task: rules(task).limits for task in TASKS}
    assert found["retrieval"].seconds == 600 and found["retrieval"].package_bytes == 4e9
    assert found["anomaly"].seconds == 3 * 3600 and found["backdoor"].seconds_per_sample == 60
    assert found["backdoor"].package_bytes == 1e6 and found["backdoor"].tuned_constants == 1
    assert all(limits.gpu_memory_gib == 24 for limits in found.values())


@pytest.mark.parametrize(("line", "message"), [
    ("package_byte = 5", r"backdoor.toml \[limits\]: expected keys among memory_gib, .*, found package_byte$"),
    ('package_bytes = "5"', r"backdoor.toml \[limits\] package_bytes: expected int, found '5'"),
    ("package_bytes = true", r"backdoor.toml \[limits\] package_bytes: expected int, found True"),
    ("package_bytes = ", r"backdoor.toml: expected TOML, found "),
])
def test_wrong_rules_are_named(tmp_path, refuses, line, message):
    with refuses(message):
        read_rules(second_contest(tmp_path, package_bytes=line) / "backdoor.toml")


def test_missing_rules_are_named(tmp_path, refuses):
    with refuses(r"anomaly.toml: expected the rules of a task, found no such file"):
        read_rules(tmp_path / "anomaly.toml")
    with refuses(r"--rules: expected a folder with one TOML file a task, found .*nowhere"):
        use_rules(tmp_path / "nowhere")
    with refuses(r"\[limits\]: expected the keys memory_gib, processes, written_bytes, found no processes"):
        read_rules(second_contest(tmp_path, processes="") / "backdoor.toml")
    folder = tmp_path / "unsorted"
    folder.mkdir()
    with refuses(r"leaderboard: expected scores, best first, found \(1, 2\)"):
        read_rules(second_contest(folder, leaderboard="leaderboard = [1, 2]") / "backdoor.toml")
