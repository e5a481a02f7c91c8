import pytest

from submit.rules import place, rules


@pytest.mark.parametrize("task", ["retrieval", "anomaly", "backdoor"])
def test_leaderboards_are_ten_scores_best_first(task):
    board = rules(task).leaderboard
    assert len(board) == 10 and list(board) == sorted(board, reverse=True)


def test_place():
    board = (90.0, 80.0, 70.0)
    assert [place(v, board) for v in (95, 90, 85, 70, 69)] == [1, 1, 2, 3, None]


def test_weights_of_the_anomaly_score():
    assert sum(rules("anomaly").weights.values()) == pytest.approx(8.4)
