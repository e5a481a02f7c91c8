"""Search in a gallery against the full matrix of cosines."""
from pathlib import Path

import numpy as np
import pytest
import torch

from retrieval import gallery
from retrieval.gallery import ExactGallery, nearest


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def full_matrix(queries, vectors, k):
    """All cosines in float64, rounded to float32, sorted; a stable sort keeps the lowest row first."""
    a, b = (torch.as_tensor(np.array(x, '=f8') if isinstance(x, np.ndarray) else x).double().numpy()
            for x in (queries, vectors))
    lengths = [np.linalg.norm(x, axis=1) for x in (a, b)]
    dots = np.array([[float((q * g).sum()) for g in b] for q in a]).reshape(len(a), len(b))
    with np.errstate(invalid="ignore"):
        cosines = np.nan_to_num(dots / np.outer(*lengths)).astype(np.float32)
    rows = np.argsort(-cosines, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(cosines, rows, axis=1), rows


def assert_same(found, wanted):
    np.testing.assert_array_equal(found[1].numpy(), wanted[1])
    np.testing.assert_allclose(found[0].numpy(), wanted[0], rtol=2e-7, atol=1e-12)


def bytes_for(rows, width, queries):
    """The memory bound under which a block has this many rows."""
    return 2 * rows * (16 * width + 12 * min(queries, gallery.QUERY_BLOCK))


@pytest.fixture(params=[(1, False), (2, True), (7, True), (7, False), (50, False), (1000, True)],
                ids=lambda given: f"blocks of {given[0]}" + " in bfloat16" * given[1])
def block(request, monkeypatch):
    monkeypatch.setattr(gallery, "half_is_faster", lambda _: request.param[1])
    return request.param[0]


@pytest.mark.parametrize("k", [1, 5, 64])
def test_blocks_agree_with_the_full_matrix_and_lengths_do_not_matter(block, k):
    queries, vectors = 3 * randn(9, 6), randn(64, 6, seed=1) * (1 + torch.arange(64.0))[:, None]
    found = ExactGallery(vectors, max_bytes=bytes_for(block, 6, 9)).search(queries, k)
    assert_same(found, full_matrix(queries, vectors, k))
    assert found[0].dtype == torch.float32 and found[1].dtype == torch.int64


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_are_compared_as_they_are_given(block, dtype):
    queries, vectors = randn(5, 16).to(dtype), randn(60, 16, seed=1).to(dtype)
    found = ExactGallery(vectors, max_bytes=bytes_for(block, 16, 5)).search(queries, 7)
    assert_same(found, full_matrix(queries.double(), vectors.double(), 7))


def test_plain_float32_cosines_give_the_same_rows():
    queries, vectors = randn(20, 32), randn(500, 32, seed=1).half()
    units = [torch.nn.functional.normalize(x.float(), dim=1) for x in (queries, vectors)]
    scores, rows = (units[0] @ units[1].T).sort(descending=True, stable=True)
    found = ExactGallery(vectors, max_bytes=bytes_for(33, 32, 20)).search(queries, 10)
    assert torch.equal(found[1], rows[:, :10])
    torch.testing.assert_close(found[0], scores[:, :10], atol=1e-6, rtol=0)


def test_among_equals_the_lowest_row_wins_in_every_block(block):
    few = randn(4, 5)
    vectors = few[torch.randint(4, (60,), generator=torch.Generator().manual_seed(2))]  # each about 15 times
    vectors[1::2] *= 4  # the same direction
    queries = torch.cat([few, randn(3, 5, seed=3)])
    found = ExactGallery(vectors, max_bytes=bytes_for(block, 5, 7)).search(queries, 20)
    assert_same(found, full_matrix(queries, vectors, 20))


def test_of_many_equal_rows_only_the_first_are_scored(monkeypatch):
    """Galleries with the same image thousands of times: every one was scored for every query."""
    distinct, queries = randn(3, 6, seed=1), randn(5, 6)
    vectors = distinct[torch.randint(3, (400,), generator=torch.Generator().manual_seed(2))]
    scored = []
    monkeypatch.setattr(gallery, "_cosines", lambda a, b, own=gallery._cosines: scored.append(len(a)) or own(a, b))
    found = ExactGallery(vectors, max_bytes=bytes_for(200, 6, 5)).search(queries, 2)
    assert_same(found, full_matrix(queries, vectors, 2))
    assert sum(scored) <= 2 * 5 * max(3 * 2, gallery.MANY * 2)  # two blocks, five queries, two best


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_first_of_equal_rows_are_told_in_every_type(kind):
    rows = torch.tensor([[1, 2], [3, 4], [1, 2], [1, 2], [3, 4], [5, 6]], dtype=kind)
    assert gallery._first_twins(rows, 1).tolist() == [True, True, False, False, False, True]
    assert gallery._first_twins(rows, 2).tolist() == [True, True, True, False, True, True]


def test_a_gallery_of_one_image_many_times_comes_in_its_order(block):
    vectors = randn(1, 300).expand(90, 300)
    scores, rows = ExactGallery(vectors, max_bytes=bytes_for(block, 300, 2)).search(randn(2, 300, seed=1), 40)
    assert rows.tolist() == [list(range(40))] * 2 and (scores == scores[:, :1]).all()


def test_differences_below_the_error_of_a_float32_product_count(block):
    vectors = randn(1, 300).double() + 1e-6 * randn(90, 300, seed=1).double()  # cosines differ by about 1e-7
    queries = randn(2, 300).double() + 1
    found = ExactGallery(vectors, max_bytes=bytes_for(block, 300, 2)).search(queries, 30)
    assert_same(found, full_matrix(queries, vectors, 30))


@pytest.mark.parametrize(("spread", "kinds"), [(1.0, [True] * 4), (1e-3, [True] + [False] * 4)])
def test_images_that_lie_close_together_are_compared_in_float32(monkeypatch, spread, kinds):
    seen, real = [], gallery._candidates
    monkeypatch.setattr(gallery, "half_is_faster", lambda _: True)
    monkeypatch.setattr(gallery, "_candidates", lambda *given: (seen.append(given[-1]), real(*given))[1])
    vectors, queries = randn(1, 64) + spread * randn(400, 64, seed=1), randn(3, 64, seed=2)
    found = ExactGallery(vectors, max_bytes=bytes_for(100, 64, 3)).search(queries, 2)
    assert seen == kinds
    assert_same(found, full_matrix(queries, vectors, 2))


def test_a_float32_product_that_is_made_coarser_elsewhere_is_allowed_for(monkeypatch):
    exact = gallery._slack(768, coarse=False)
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "medium")
    assert gallery._slack(768, coarse=False) == gallery._slack(768, coarse=True) > 50 * exact


def test_all_cosines_negative_still_find_the_least_bad(block):
    vectors = randn(60, 4).abs()
    queries = -randn(3, 4, seed=1).abs()
    found = ExactGallery(vectors, max_bytes=bytes_for(block, 4, 3)).search(queries, 3)
    assert (found[0] < 0).all()
    assert_same(found, full_matrix(queries, vectors, 3))


def test_a_k_beyond_the_gallery_gives_all_of_it(block):
    queries, vectors = randn(3, 4), randn(11, 4, seed=1)
    found = ExactGallery(vectors, max_bytes=bytes_for(block, 4, 3)).search(queries, 99)
    assert found[1].shape == (3, 11)
    assert_same(found, full_matrix(queries, vectors, 99))


def test_one_image_and_no_queries():
    one = ExactGallery(torch.tensor([[0.0, -2.0]]))
    scores, rows = one.search(torch.tensor([[0.0, 1.0], [1.0, 0.0]]), 5)
    assert scores.tolist() == [[-1.0], [0.0]] and rows.tolist() == [[0], [0]]
    scores, rows = one.search(torch.zeros(0, 2), 5)
    assert scores.shape == rows.shape == (0, 1)


def test_vectors_of_zeros_have_cosine_zero(block):
    vectors = torch.tensor([[-1.0, 0.0], [0.0, 0.0], [0.0, 3.0], [0.0, 0.0]])
    queries = torch.tensor([[1.0, 0.0], [0.0, 0.0]])
    scores, rows = ExactGallery(vectors, max_bytes=bytes_for(block, 2, 2)).search(queries, 4)
    assert rows.tolist() == [[1, 2, 3, 0], [0, 1, 2, 3]]
    assert scores.tolist() == [[0, 0, 0, -1], [0, 0, 0, 0]]


@pytest.mark.parametrize("factor", [1e-30, 1e-21, 1e30])  # at 1e-21 squares lose digits
def test_extreme_lengths_keep_their_direction(factor):
    queries, vectors = randn(4, 8), randn(30, 8, seed=1)
    assert torch.equal(ExactGallery(vectors * factor).search(queries * factor, 5)[1],
                       ExactGallery(vectors).search(queries, 5)[1])
    lengths = gallery.unit_rows(vectors * factor, "gallery").double().norm(dim=1)
    torch.testing.assert_close(lengths, torch.ones(30).double(), atol=1e-6, rtol=0)


def test_more_queries_than_a_query_block(monkeypatch, block):
    monkeypatch.setattr(gallery, "QUERY_BLOCK", 3)
    queries, vectors = randn(10, 4), randn(40, 4, seed=1)
    found = ExactGallery(vectors, max_bytes=bytes_for(block, 4, 10)).search(queries, 6)
    assert_same(found, full_matrix(queries, vectors, 6))


@pytest.mark.parametrize("mode", ["r", "r+", "c"])
@pytest.mark.parametrize("dtype", ["<f2", ">f4"])
def test_a_memory_map_is_searched_and_left_as_it_was(tmp_path, mode, dtype, block):
    vectors = randn(60, 100, seed=1).numpy().astype(dtype)
    np.save(tmp_path / "gallery.npy", vectors)
    mapped = np.load(tmp_path / "gallery.npy", mmap_mode=mode)
    if mode != "r":
        mapped[7] = vectors[7] = -vectors[7]  # in mode "c" this change stands in memory alone
    for part in (slice(None), slice(5, 50)):
        found = ExactGallery(mapped[part], max_bytes=bytes_for(block, 100, 4)).search(randn(4, 100), 5)
        assert_same(found, full_matrix(randn(4, 100), vectors[part], 5))
    np.testing.assert_array_equal(mapped, vectors)


def resident(address):
    """KiB of the mapping at this address that are in this process's memory."""
    lines = iter(Path("/proc/self/smaps").read_text().splitlines())
    for line in lines:
        if line.startswith(f"{address:08x}-"):
            return next(int(line.split()[1]) for line in lines if line.startswith("Rss:"))
    raise AssertionError("no such mapping")


def test_pages_of_a_memory_map_are_given_back(tmp_path):
    if not hasattr(gallery.mmap, "MADV_DONTNEED"):
        pytest.skip("MADV_DONTNEED: this system does not know it")
    vectors = np.memmap(tmp_path / "gallery", np.float16, "w+", shape=(64_000, 64))  # 8 MiB
    vectors[:] = 1
    vectors.flush()
    address = np.frombuffer(vectors.base, np.uint8).ctypes.data
    assert resident(address) > 7000
    ExactGallery(vectors, max_bytes=2**20).search(randn(2, 64), 3)
    assert resident(address) < 1000


def test_memory_stays_within_the_bound(monkeypatch):
    held, real = [], gallery._candidates
    monkeypatch.setattr(gallery, "_candidates", lambda queries, block, *rest: (
        held.append((len(queries), len(block))), real(queries, block, *rest))[1])
    ExactGallery(randn(3000, 10), max_bytes=100_000).search(randn(500, 10, seed=1), 2)
    assert {q for q, _ in held} == {256, 244} and sum(b for _, b in held) == 2 * 3000
    assert max(b for _, b in held) * (16 * 10 + 12 * 256) <= 50_000


def test_the_caller_keeps_its_tensors_and_generator():
    queries, vectors, state = randn(5, 6), randn(9, 6, seed=1), torch.get_rng_state()
    ExactGallery(vectors).search(queries, 2)
    assert torch.equal(queries, randn(5, 6)) and torch.equal(vectors, randn(9, 6, seed=1))
    assert torch.equal(torch.get_rng_state(), state)


def test_nearest_is_the_first_of_the_best():
    vectors = torch.eye(4)[[2, 1, 1, 2, 1]]
    assert nearest(torch.eye(4)[[1, 2, 0]], vectors).tolist() == [1, 0, 0]  # the last: all cosines are 0
    assert nearest(torch.zeros(0, 4), vectors).tolist() == []


def test_what_is_no_gallery_is_refused(refuses):
    with refuses(r"gallery: expected at least one image, shape \(G, D\), found \(0, 4\)"):
        nearest(torch.eye(4), torch.zeros(0, 4))
    with refuses(r"gallery: expected at least one image, shape \(G, D\), found \(4,\)"):
        ExactGallery(torch.zeros(4))
    with refuses("gallery: expected floating-point numbers of 16 to 64 bits, found torch.int64"):
        ExactGallery(torch.zeros(3, 4, dtype=torch.long))
    with refuses("gallery: expected floating-point numbers of 16 to 64 bits, found int8"):
        ExactGallery(np.zeros((3, 4), np.int8))


def test_queries_that_do_not_fit_are_refused(refuses):
    images = ExactGallery(torch.eye(4))
    with refuses(r"queries: expected shape \(Q, 4\), as the gallery has, found \(2, 3\)"):
        images.search(torch.zeros(2, 3), 1)
    with refuses("queries: expected floating-point numbers, found torch.int64"):
        images.search(torch.zeros(2, 4, dtype=torch.long), 1)
    with refuses("k: expected >= 1, found 0"):
        images.search(torch.eye(4), 0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_row_that_is_not_finite_is_numbered(refuses, bad, block):
    vectors = randn(60, 4)
    vectors[37, 2] = bad
    with refuses("gallery row 37: expected finite numbers, found NaN or infinity"):
        ExactGallery(vectors, max_bytes=bytes_for(block, 4, 4)).search(torch.eye(4), 1)
    with refuses("queries row 37: expected finite numbers, found NaN or infinity"):
        ExactGallery(torch.eye(4)).search(vectors, 1)
