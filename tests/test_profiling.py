"""From samples in small to the size asked for, and to a verdict."""
import json
from dataclasses import replace

import pytest
import torch

from anomaly.mutual_scoring import CPU_BYTES, GPU_BYTES, block_side
from anomaly.presets import PRESETS
from data.images import read_rgb
from defense import dvae, purification
from defense.dvae_network import NetworkConfig
from defense.dvae_stage import StageConfig
from submit import workloads
from submit.op_costs import CONVOLUTION, HALF, MATMUL, SINGLE, Cost, Counted, count, total
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
from submit.workloads import Place, Stage, Workload, anomaly, backdoor, purify, repair, retrieval
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
    assert purify(10, 10, 32, True).planned


@pytest.mark.parametrize("limit", [0.5, 30, 3000.0, 1e9])
def test_the_largest_size_is_what_trying_all_finds(limit):
    samples = {"work": Sampled({n: counted(n * n) for n in (2, 4, 6)}, 1.0)}

    def build(n):
        return Workload("", (stage(n, (2, 4, 6)),))

    found = largest(build, samples, RATES, limit, 1e9, start=5, most=10_000)
    fitting = [n for n in range(1, 10_001) if n * n / 10 <= limit]
    assert max(fitting, default=0) * 0.99 - 1 <= found <= max(fitting, default=0)


def comparison(preset, images, half):
    return next(s for s in anomaly(preset, images, 1, half).stages if s.name.startswith("compare"))


@pytest.mark.parametrize("preset", ["embedded", "report", "musc"])
def test_the_comparison_on_a_gpu_is_counted_in_the_blocks_of_a_gpu(tmp_path, preset):
    compare, (shape, *_) = comparison(preset, 10, True), workloads._net_shapes(preset)
    patches, degrees = shape.grid[0] * shape.grid[1], len(PRESETS[preset].scoring.degrees)
    side = block_side(patches, 2, GPU_BYTES)
    assert compare.sizes == (2 * side, 3 * side, 5 * side) and not comparison(preset, 10, False).net
    found = count(compare.prepare(3 * side, Place(tmp_path, torch.device("meta")))).costs[MATMUL, HALF]
    assert found.calls == degrees * 6  # of 3 x 3 blocks the upper half
    by_hand = 2 * degrees * 6 * (side * patches) ** 2 * shape.width
    assert by_hand < found.flop < 1.07 * by_hand  # a few columns more, for the norms


def test_a_comparison_counted_without_numbers_costs_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr("anomaly.mutual_scoring.GPU_BYTES", CPU_BYTES)
    monkeypatch.setattr("anomaly.mutual_scoring._Pairs._mend", lambda *_: None)  # without numbers no place is mended
    made = comparison("embedded", 10, False)
    real, on_meta = (count(made.prepare(9, Place(tmp_path, torch.device(d)))) for d in ("cpu", "meta"))
    for key, cost in real.costs.items():
        found = on_meta.costs[key]
        assert found.flop == pytest.approx(cost.flop, rel=0.05)  # numbers a patch for its norm: more in bfloat16
        assert (found.calls, found.bytes) == pytest.approx((cost.calls, cost.bytes), rel=0.1)


def test_what_is_not_timed_here_is_predicted_for_here():
    samples = {"work": Sampled({2: counted(50)}, None, {2: counted(20)})}
    (found,) = stage_profiles(Workload("", (stage(4, (2,)),)), samples, RATES, RATES)
    assert found.here is None and found.predicted == Range(5, 10) and found.guessed == Range(2, 4)
    assert found.record()["seconds_here_predicted"] == [2, 4]
    (found,) = stage_profiles(Workload("", (stage(4, (2,)),)), {"work": replace(samples["work"], seconds=1.0)}, RATES)
    assert found.here == 2 and found.guessed is None


@pytest.mark.parametrize(("more", "tolerance"), [(0, 1e-9), (3, 0.05)])  # whole blocks, and not
def test_a_comparison_costs_what_the_polynomial_of_small_ones_says(tmp_path, more, tolerance):
    side = comparison("embedded", 10, False).sizes[0] // 2  # of a block: more where the CPU compares in 16 bits
    images = 4 * side + more
    compare = comparison("embedded", images, False)
    small = {n: total(count(compare.prepare(n, Place(tmp_path, CPU))).costs).flop for n in compare.sizes}
    truth = total(count(compare.prepare(images, Place(tmp_path, CPU))).costs).flop
    assert through(small, images) == pytest.approx(truth, rel=tolerance)


def test_every_task_has_stages_that_can_be_made():
    for made in (retrieval("report", 10, True), anomaly("report", 10, 2, True), anomaly("embedded", 10, 2, False),
                 backdoor(200, True), repair(100, 10, True), purify(100, 1, 32, False), purify(100, 10, 224, True)):
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


def narrow(precision):
    """A purification that a CPU does at once: two stages that differ in all that counts."""
    first = StageConfig(epochs=2, batch=4, precision=precision, network=NetworkConfig(width=8, latent=8))
    second = StageConfig(epochs=1, batch=8, precision=precision, network=NetworkConfig(width=4, latent=16))
    return dvae.DVAEConfig(first, second, perturbations=False)


def counted_nets(made, folder):
    """The device's costs of a workload at its size, by stage."""
    samples = {s.name: Sampled({} if s.host else {n: count(s.prepare(n, Place(folder, torch.device("meta"))))
                                                  for n in s.sizes}, 1.0) for s in made.stages}
    return {s.name: s.costs for s in stage_profiles(made, samples, RATES) if not s.host}


@pytest.mark.parametrize(("precision", "half"), [("float32", False), ("bfloat16", True)])
def test_a_purification_costs_what_counting_all_of_it_finds(monkeypatch, tmp_path, precision, half):
    monkeypatch.setattr(purification, "shipped_config", lambda height, width: narrow(precision))
    images, labels = torch.zeros(8, 3, 16, 16, dtype=torch.uint8), torch.arange(8) % 2
    truth = count(lambda: dvae.purify(images, labels, narrow(precision), generator=torch.Generator().manual_seed(0)))
    found = counted_nets(purify(8, 2, 16, half), tmp_path).values()
    for key in ((CONVOLUTION, SINGLE), (CONVOLUTION, HALF)):
        flop = truth.costs.get(key, Cost()).flop
        assert sum(costs.get(key, Cost()).flop for costs in found) == pytest.approx(flop, rel=1e-9)
        assert bool(flop) == (half or key[1] == SINGLE)
    assert sum(total(costs).bytes for costs in found) == pytest.approx(total(truth.costs).bytes, rel=0.15)


def test_a_purification_is_the_shipped_one():
    for side, epochs in ((32, 60), (64, 60), (65, 20)):
        config = purification.shipped_config(side, side)
        read, *nets, write = purify(1000, 10, side, True).stages
        assert config.stages == "both" and config.first.epochs == config.second.epochs == epochs
        assert [(s.units, s.times, s.sizes) for s in nets] == [
            (1000, epochs, (config.first.batch,)), (1000, 1, (dvae.inference_batch(side, side),)),
            (1000, epochs, (config.second.batch,)), (1000, 2, (dvae.inference_batch(side, side),))]
        assert (read.units, write.units) == (1000, 1000) and read.host and write.host
        # sets of RGB images at once: as given, of stage 1 and, in the end, of stage 2
        assert [s.kept_bytes / (3 * side * side) for s in nets] == [1, 2, 2, 3]


def test_small_files_are_read_and_written(tmp_path):
    read, *_, write = purify(10, 2, 5, False).stages
    for name, stage in (("read", read), ("write", write)):
        (tmp_path / name).mkdir()
        with torch.inference_mode():
            stage.prepare(6, Place(tmp_path / name, CPU))()
        files = list((tmp_path / name).rglob("*.png"))
        assert len(files) == 6 and {read_rgb(file).size for file in files} == {(5, 5)}


def test_a_purification_is_held_to_its_own_limit_and_cut_short_there(capsys, tmp_path):
    status, out, err = run(capsys, "profile", "purify", "--images", 2_000_000, "--json", "--runs", tmp_path)
    found = json.loads(out)
    assert (status, err) == (0, "") and found["limit_s"] == purification.LIMIT_S == 3 * 3600
    assert found["verdict"] == CUT_SHORT and 1000 < found["largest_images"] < 2_000_000
    assert found["notes"][0].startswith("the deadline of a purification cuts epochs")
    flop = {stage["stage"]: stage["flop"] for stage in found["stages"]}
    for number in (1, 2):  # 0.42 GMAC an image forward, by hand from the layers; twice as much back; 60 epochs
        assert flop[f"train stage {number}"] == pytest.approx(3 * 2 * 0.42e9 * 60 * 2e6, rel=0.01)
        assert flop[f"apply stage {number}"] == pytest.approx(number * 2 * 0.42e9 * 2e6, rel=0.01)
    assert all(stage["seconds_here"] is None for stage in found["stages"] if stage["on"] == "device")  # too large


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
    (["purify", "--queries", 5],
     "--queries: expected with another task; purify has --images, --classes, --side, found 5"),
    (["repair", "--side", 64], "--side: expected with another task; repair has --images, --classes, found 64"),
    (["purify", "--classes", 0], "Invalid value for '--classes'"),
    (["purify", "--side", 0], "Invalid value for '--side'"),
    (["backdoor", "--classes", 2], "--classes: expected >= 3 of a network, found 2"),
    (["repair", "--classes", 2], "--classes: expected >= 3 of a network, found 2"),
    (["purify", "--preset", "report"], "--preset: expected with retrieval or anomaly, found purify"),
    (["retrieval", "--preset", "musc"], "--preset: expected one of embedded, report for retrieval, found musc"),
    (["anomaly", "--images", 1], "Invalid value for '--images'"),
    (["all"], "'all' is not one of 'retrieval', 'anomaly', 'backdoor', 'repair', 'purify'")])
def test_bad_input_ends_in_one_line(capsys, tmp_path, arguments, message):
    status, out, err = run(capsys, "profile", *arguments, "--runs", tmp_path)
    assert (status, out) == (2, "") and message in err and len(err.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())
