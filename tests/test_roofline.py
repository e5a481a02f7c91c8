"""Seconds from costs, and rates of GPUs from a table."""
import pytest
import torch

from submit.calibration import measured_rates
from submit.op_costs import ATTENTION, CONVOLUTION, DOUBLE, HALF, MATMUL, MEMORY, SINGLE, Cost
from submit.roofline import ASSUMED, Range, Rates, assumed_rates, carried_rates, gpu, gpu_called, gpus

RATES = Rates({(MATMUL, SINGLE): Range(10, 20), (CONVOLUTION, SINGLE): Range(5, 5)}, Range(100, 200), Range(0.1, 0.3))


def test_the_slower_of_computing_and_moving_counts():
    assert RATES.seconds({(MATMUL, SINGLE): Cost(40, 100, 0)}) == Range(2, 4)       # computing: 40 / 20, 40 / 10
    assert RATES.seconds({(MATMUL, SINGLE): Cost(10, 1000, 0)}) == Range(5, 10)     # moving: 1000 / 200, 1000 / 100
    assert RATES.seconds({(MEMORY, SINGLE): Cost(0, 400, 10)}) == Range(2 + 1, 4 + 3)
    both = RATES.seconds({(MATMUL, SINGLE): Cost(40, 0, 0), (CONVOLUTION, SINGLE): Cost(5, 0, 0)})
    assert both == Range(2 + 1, 4 + 1)
    assert RATES.seconds({}) == Range(0, 0)


def test_a_precision_that_was_not_measured_goes_at_the_rate_of_single():
    assert RATES.seconds({(MATMUL, HALF): Cost(40, 0, 0)}) == RATES.seconds({(MATMUL, SINGLE): Cost(40, 0, 0)})


def test_every_gpu_has_all_figures_and_the_judge_is_among_them():
    assert "rtx4090" in gpus() and len(gpus()) >= 5
    for found in gpus().values():
        peaks = found.peaks
        assert found.memory > 0 and peaks[HALF] >= peaks["tf32"] >= peaks[SINGLE] > peaks[DOUBLE]
    judge = gpu("rtx4090")
    assert (judge.memory, judge.bandwidth, judge.peak(MATMUL, HALF)) == (24, 1008, 165.2e12)


def test_float32_convolutions_run_in_tf32_and_products_do_not():
    found = gpu("a100")
    assert found.peak(CONVOLUTION, SINGLE) == 156e12 and found.peak(MATMUL, SINGLE) == 19.5e12
    assert found.peak(CONVOLUTION, HALF) == 312e12


def test_an_unknown_gpu_is_refused_with_the_known_ones(refuses):
    with refuses("--gpu: expected one of rtx4090, .*, or here, found rtx1"):
        gpu("rtx1")


@pytest.mark.parametrize(("name", "key"), [("NVIDIA GeForce RTX 4090", "rtx4090"), ("NVIDIA H200", "h200"),
                                           ("NVIDIA H100 80GB HBM3", "h100"), ("NVIDIA GeForce GTX 980", None),
                                           ("NVIDIA L40S", None), ("T400 4GB", None), ("NVIDIA L4", "l4"),
                                           ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
                                           ("NVIDIA A100-SXM4-80GB", "a100"), ("NVIDIA GH200 480GB", None)])
def test_a_driver_name_means_a_gpu_of_the_table(name, key):
    found = gpu_called(name)
    assert (found.key if found else None) == key


def test_assumed_rates_are_shares_of_peak():
    found, target = assumed_rates(gpu("rtx4090")), gpu("rtx4090")
    low, high = ASSUMED[ATTENTION]
    assert found.flop[ATTENTION, HALF] == Range(low * 165.2e12, high * 165.2e12)
    assert found.bytes.high == pytest.approx(ASSUMED[MEMORY][1] * 1008e9)
    assert set(found.flop) == {(k, p) for k in (MATMUL, CONVOLUTION, ATTENTION) for p in (HALF, SINGLE, DOUBLE)}
    assert all(r.low < r.high <= target.peak(*key) for key, r in found.flop.items())


def test_shares_measured_on_one_gpu_are_carried_to_another():
    here, target = gpu("h200"), gpu("rtx4090")
    measured = Rates({(MATMUL, HALF): Range(0.5 * 989.4e12, 0.8 * 989.4e12)}, Range(2400e9, 4320e9), Range(3e-6, 9e-6))
    found = carried_rates(measured, here, target)
    assert found.flop[MATMUL, HALF].low == pytest.approx(0.6 * 0.5 * 165.2e12)
    assert found.flop[MATMUL, HALF].high == pytest.approx(0.8 * 165.2e12)
    assert found.bytes == Range(pytest.approx(0.6 * 0.5 * 1008e9), pytest.approx(0.9 * 1008e9))
    assert found.flop[CONVOLUTION, SINGLE] == assumed_rates(target).flop[CONVOLUTION, SINGLE]  # was not measured
    assert found.launch == measured.launch


def test_calibration_times_every_kind_by_the_clock():
    now = iter(range(10**9))
    rates = measured_rates(torch.device("cpu"), clock=lambda: float(next(now)))  # every timing takes one second
    assert {kind for kind, _ in rates.flop} == {MATMUL, CONVOLUTION, ATTENTION}
    assert rates.flop[MATMUL, SINGLE] == Range(2 * 256 * 384 * 384, 2 * 1024**3)
    assert rates.launch == Range(1 / 200, 3 / 200)
    assert rates.bytes.low <= 2 * 4 * (1 << 20) + 2**20 and rates.bytes.high >= 2 * 4 * (1 << 24)
