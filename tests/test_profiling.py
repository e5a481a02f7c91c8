"""From samples in small to the size asked for, and to a verdict."""
import json

import pytest
import torch

from submit.op_costs import MATMUL, SINGLE, Cost, Counted, count, total
from submit.profiling import (
    CUT_SHORT,
    EXCEEDS,
    FITS,
    TIGHT,
    UNKNOWN,
    Sampled,
    largest,
    peak_bytes,
    sample,
    stage_profiles,
    through,
    verdict,
    whole,
)
from submit.roofline import Range, Rates
from submit.workloads import Place, Stage, Workload, anomaly, backdoor, repair, retrieval
from tests.test_score_command import run

RATES = Rates({(MATMUL, SINGLE): Range(10, 20)}, Range(1e9, 1e9), Range(0, 0))
CPU = torch.device("cpu")


def stage(units, sizes=(2,), **more):
    return Stage("work", "things", units, sizes, lambda n, place: lambda: None, **more)


def counted(flop, peak=0):
    return Counted({(MATMUL, SINGLE): Cost(flop, 0, 0)}, peak)


def test_a_polynomial_goes_through_its_points():
    points = {n: 3 * n * n - 2 * n + 5 for n in (3, 5, 8)}
    assert through(points, 100) == pytest.approx(3 * 100**2 - 200 + 5)
    assert through({4: 10.0}, 10) == 25 and through({1: 5.0, 2: 1.0}, 4) == 0  # never negative


def test_costs_are_put_up_to_the_size_and_repeated():
    (found,) = stage_profiles(Workload("", (stage(100, (2, 4, 6), times=3),)),
                              {"work": Sampled({n: counted(n * n) for n in (2, 4, 6)}, 0.9)}, RATES)
    assert total(found.costs).flop == pytest.approx(30_000)
    assert found.predicted == Range(pytest.approx(1500), pytest.approx(3000))
    assert found.here == pytest.approx(0.9 * 30_000 / 36)
    assert found.units == "100 things x 3"


def test_host_work_is_in_proportion_and_not_scaled_to_a_gpu():
    (found,) = stage_profiles(Workload("", (stage(100, (4,), host=True),)), {"work": Sampled({}, 2.0)}, RATES)
    assert found.here == 50 and found.predicted.low == 50 and found.predicted.high > 50 and found.peak_bytes == 0


def test_memory_of_nets_is_that_of_a_batch_and_of_others_grows():
    samples = {"work": Sampled({2: counted(1, peak=10)}, 1.0)}
    peaks = [stage_profiles(Workload("", (stage(100, **more),)), samples, RATES)[0].peak_bytes
             for more in ({}, {"net": True}, {"net": True, "kept_bytes": 3}, {"adapts": True, "kept_bytes": 3})]
    assert peaks == [500, 10, 310, 300]


def test_stages_of_host_and_device_may_overlap_or_take_turns():
    stages = stage_profiles(Workload("", (stage(4, host=True), stage(4))),
                            {"work": Sampled({2: counted(50, 7)}, 1.0)}, RATES)
    assert whole(stages) == Range(5, 10 + 3) and peak_bytes(stages) == 14


@pytest.mark.parametrize(("seconds", "peak", "found"), [
    ((1, 10), 5, FITS), ((1, 10.1), 5, TIGHT), ((1, 16), 5, UNKNOWN), ((11, 20), 5, EXCEEDS), ((1, 2), 51, EXCEEDS)])
def test_the_verdict(seconds, peak, found):
    assert verdict(Range(*seconds), 10, peak, 50) == found


def test_work_with_a_deadline_of_its_own_is_cut_short_but_never_late():
    assert verdict(Range(11, 20), 10, 5, 50, planned=True) == CUT_SHORT
    assert verdict(Range(1, 2), 10, 51, 50, planned=True) == EXCEEDS
    assert backdoor(10, True).planned and repair(10, 10, True).planned and not anomaly("report", 10, 2, True).planned


@pytest.mark.parametrize("limit", [0.5, 30, 3000.0, 1e9])
def test_the_largest_size_is_what_trying_all_finds(limit):
    samples = {"work": Sampled({n: counted(n * n) for n in (2, 4, 6)}, 1.0)}

    def build(n):
        return Workload("", (stage(n, (2, 4, 6)),))

    found = largest(build, samples, RATES, limit, 1e9, start=5, most=10_000)
    fitting = [n for n in range(1, 10_001) if n * n / 10 <= limit]
    assert max(fitting, default=0) * 0.99 - 1 <= found <= max(fitting, default=0)


@pytest.mark.parametrize(("images", "tolerance"), [(20, 1e-9), (23, 0.05)])  # whole blocks of 5, and not
def test_a_comparison_costs_what_the_polynomial_of_small_ones_says(tmp_path, images, tolerance):
    compare = next(s for s in anomaly("embedded", images, 1, True).stages if s.name.startswith("compare"))
    small = {n: total(count(compare.prepare(n, Place(tmp_path, CPU))).costs).flop for n in compare.sizes}
    truth = total(count(compare.prepare(images, Place(tmp_path, CPU))).costs).flop
    assert through(small, images) == pytest.approx(truth, rel=tolerance)


def test_every_task_has_stages_that_can_be_made():
    for made in (retrieval("report", 10, True), anomaly("report", 10, 2, True), anomaly("embedded", 10, 2, False),
                 backdoor(200, True), repair(100, 10, True)):
        names = [s.name for s in made.stages]
        assert len(set(names)) == len(names) >= 2 and all(s.units > 0 and s.sizes for s in made.stages)


def test_a_vitamin_costs_what_its_definition_says(tmp_path):
    images = next(s for s in retrieval("report", 10, True).stages if s.name == "embed the images")
    with torch.inference_mode():
        found = count(images.prepare(1, Place(tmp_path, torch.device("meta"))))
    assert total(found.costs).flop == pytest.approx(0.47e12, rel=0.02)  # 213 GMAC in layers, 21 in attention


def test_host_stages_are_timed_by_the_clock_and_nets_are_counted_without_weights():
    now = iter(range(100))
    made = Workload("", (stage(4, host=True), backdoor(10, False).stages[1]))
    found = sample(made, made, CPU, say=lambda name: None, clock=lambda: float(next(now)))
    assert found["work"].seconds == 1 and found["work"].counted == {}
    search = found["search for perturbations"]
    assert search.seconds is None and total(search.counted[240].costs).flop > 5e11  # too large for a CPU


def test_the_command_prints_stages_verdict_and_record(capsys, tmp_path):
    status, out, err = run(capsys, "profile", "repair", "--images", 40, "--runs", tmp_path)
    assert (status, err) == (0, "") and "tune" in out and "fits: " in out and "RTX 4090" in out and "note: " in out
    (record,) = tmp_path.glob("*-profile-repair/record.json")
    found = json.loads(record.read_text())
    assert found["verdict"] == FITS and found["limit_s"] == 60 and len(found["chart"]) == len(found["stages"])
    tune = found["stages"][1]
    # tunings of 200 steps: one of all 40 images in batches of 20, five of 20; two passes a step, a forward and twice as
    # much back, 1.1 GFLOP an image
    assert tune["flop"] == pytest.approx(2 * (100 * 40 + 5 * 200 * 20) * 3 * 1.11e9, rel=0.1)


def test_what_does_not_fit_ends_with_status_1(capsys, tmp_path):
    status, out, _ = run(capsys, "profile", "backdoor", "--gpu-memory", 0.5, "--runs", tmp_path, "--json")
    found = json.loads(out)
    assert status == 1 and found["verdict"] == EXCEEDS and found["memory_gib"] == 0.5 < found["peak_gib"]


@pytest.mark.parametrize("arguments", [
    ["repair", "--images", 10], ["anomaly", "--images", 3, "--categories", 1, "--gpu-memory", 0.1]])
def test_small_sizes_and_small_memory_have_a_verdict(capsys, tmp_path, arguments):
    status, out, err = run(capsys, "profile", *arguments, "--runs", tmp_path)
    assert status in (0, 1) and err == "" and "largest that surely fits: about " in out


def test_weights_and_the_largest_stage_share_the_memory():
    samples = {"work": Sampled({2: counted(1, peak=10)}, 1.0)}
    found = stage_profiles(Workload("", (stage(4, weight_bytes=100),)), samples, RATES)
    assert peak_bytes(found) == 20 + 100
    (found,) = stage_profiles(Workload("", (stage(4, weight_bytes=100, adapts=True, kept_bytes=50),)), samples, RATES)
    assert peak_bytes([found]) == 300 and peak_bytes([found], 250) == 250 and peak_bytes([found], 80) == 100


@pytest.mark.parametrize(("arguments", "message"), [
    (["anomaly", "--queries", 3], "--queries: expected with another task; anomaly has --images, --categories, found 3"),
    (["backdoor", "--gpu", "gtx"], "--gpu: expected one of rtx4090, "),
    (["repair", "--preset", "report"], "--preset: expected with retrieval or anomaly, found repair"),
    (["retrieval", "--preset", "musc"], "--preset: expected one of embedded, report for retrieval, found musc"),
    (["anomaly", "--images", 1], "Invalid value for '--images'"),
    (["all"], "'all' is not one of 'retrieval', 'anomaly', 'backdoor', 'repair'")])
def test_bad_input_ends_in_one_line(capsys, tmp_path, arguments, message):
    status, out, err = run(capsys, "profile", *arguments, "--runs", tmp_path)
    assert (status, out) == (2, "") and message in err and len(err.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())
