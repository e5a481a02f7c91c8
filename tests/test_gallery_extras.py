"""FAISS and Qdrant behind the same interface, against exact search.

Qdrant: against the server at $KIT_QDRANT_URL where there is one, and always against a stand-in on this machine that
speaks the few requests in use.
"""
import json
import os
import socket
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch

from retrieval import faiss_gallery, qdrant_gallery
from retrieval.faiss_gallery import FaissGallery
from retrieval.gallery import ExactGallery
from retrieval.qdrant_gallery import QdrantGallery, upload

NAME = "kit-test"


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def assert_same_as_exact(gallery, queries, vectors, k):
    scores, rows = gallery.search(queries, k)
    wanted = ExactGallery(vectors).search(queries, k)
    assert torch.equal(rows, wanted[1]) and rows.dtype == torch.int64
    torch.testing.assert_close(scores, wanted[0], atol=2e-6, rtol=0)


# --- FAISS

@pytest.fixture
def faiss():
    return pytest.importorskip("faiss", reason="faiss-cpu (requirements-extras.txt) is not installed")


@pytest.mark.parametrize("k", [1, 7, 500])
def test_a_flat_index_agrees_with_exact_search(faiss, k, monkeypatch):
    monkeypatch.setattr(faiss_gallery, "MAX_BYTES", 16 * 24 * 130)  # three blocks
    vectors = (randn(300, 24, seed=1) * 5).half()
    assert_same_as_exact(FaissGallery(vectors), randn(8, 24) - 0.2, vectors, k)


def test_an_index_of_a_memory_map(faiss, tmp_path):
    np.save(tmp_path / "g.npy", randn(50, 8).half().numpy())
    mapped = np.load(tmp_path / "g.npy", mmap_mode="r")
    assert_same_as_exact(FaissGallery(mapped), randn(3, 8, seed=1), mapped, 5)


def test_an_approximate_index_is_trained_and_exact_when_it_looks_everywhere(faiss, monkeypatch):
    monkeypatch.setattr(faiss_gallery, "SAMPLE_ROWS", 200)
    vectors, queries = randn(600, 16, seed=1), randn(20, 16)
    assert_same_as_exact(FaissGallery(vectors, kind="IVF4,Flat", probes=4), queries, vectors, 5)
    scores, rows = FaissGallery(vectors, kind="IVF4,Flat", probes=1).search(queries, 600)
    assert rows.shape == (20, 600) and (rows[:, -1] == -1).all() and (scores[:, -1] == -torch.inf).all()
    found = rows[0][rows[0] >= 0]
    everything = ExactGallery(vectors).search(queries[:1], 600)
    assert 50 < len(found) < 500  # about one group of four
    assert found.tolist() == [r for r in everything[1][0].tolist() if r in set(found.tolist())]


def test_no_queries(faiss):
    assert FaissGallery(randn(5, 4)).search(torch.zeros(0, 4), 2)[1].shape == (0, 2)


def test_bad_input_is_refused_as_by_exact_search(faiss, refuses):
    with refuses(r"gallery: expected at least one image, shape \(G, D\), found \(0, 4\)"):
        FaissGallery(torch.zeros(0, 4))
    bad = randn(9, 4)
    bad[6, 1] = float("nan")
    with refuses("gallery row 6: expected finite numbers"):
        FaissGallery(bad)
    with refuses(r"queries: expected shape \(Q, 4\)"):
        FaissGallery(randn(5, 4)).search(randn(2, 3), 1)


def test_without_faiss_one_line_says_what_to_install(monkeypatch, refuses):
    monkeypatch.setitem(sys.modules, "faiss", None)
    with refuses("^faiss-cpu: expected to be installed .pip install -r requirements-extras.txt., found"):
        FaissGallery(randn(5, 4))


# --- Qdrant

class StandIn(BaseHTTPRequestHandler):
    """One collection a name: its width, its distance and its points; answers as the server's interface is described."""

    def respond(self):
        body = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or "null")
        self.server.requests.append((self.command, self.path))
        _, _, name, *rest = self.path.split("?")[0].split("/")
        held = self.server.collections.get(name)
        if rest == ["exists"]:
            result = {"exists": held is not None}
        elif self.command == "PUT" and not rest:
            self.server.collections[name] = {**body["vectors"], "shards": body.get("shard_number"), "points": {}}
            result = True
        elif held is None:
            return self.answer(404, {"status": {"error": f"Not found: Collection `{name}` doesn't exist!"}})
        else:
            result = getattr(self, "_".join([self.command, *rest]))(held, body)
        return self.answer(200, {"result": result, "status": "ok", "time": 0.0})

    do_GET = do_PUT = do_POST = respond

    def answer(self, status, content):
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def GET(self, held, _):
        config = {"params": {"vectors": {"size": held["size"], "distance": held["distance"]}},
                  "hnsw_config": {"m": 16, "ef_construct": 100, "full_scan_threshold": 10000},
                  "optimizer_config": {"default_segment_number": 0, "flush_interval_sec": 5}}
        return {"status": "green", "optimizer_status": "ok", "segments_count": 1, "config": config,
                "payload_schema": {}}

    def PUT_points(self, held, body):
        if self.server.full_after is not None and len(held["points"]) >= self.server.full_after:
            raise ConnectionError("the stand-in breaks off")
        held["points"].update(zip(body["batch"]["ids"], body["batch"]["vectors"], strict=True))
        return {"operation_id": 0, "status": "completed"}

    def POST_points(self, held, body):
        return [{"id": i, "vector": held["points"][i]} for i in body["ids"] if i in held["points"]]

    def POST_points_count(self, held, _):
        return {"count": len(held["points"])}

    def POST_points_query_batch(self, held, body):
        ids, vectors = list(held["points"]), np.array(list(held["points"].values()), np.float32)
        answers = []
        for asked in body["searches"]:
            assert asked["params"]["exact"] is not None
            cosines = vectors @ np.array(asked["query"]["nearest"], np.float32)
            best = np.argsort(-cosines)[:asked["limit"]][::1 if asked["params"]["exact"] else 2]
            answers.append({"points": [{"id": ids[i], "version": 0, "score": float(cosines[i])} for i in best]})
        return answers

    def log_message(self, *_):
        """Quiet."""


class Server(ThreadingHTTPServer):
    def __init__(self):
        super().__init__(("127.0.0.1", 0), StandIn)
        self.collections, self.requests, self.full_after = {}, [], None
        self.url = f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, *arguments):
        if not isinstance(sys.exc_info()[1], ConnectionError):  # that one is meant
            super().handle_error(*arguments)


@pytest.fixture
def server(monkeypatch):
    pytest.importorskip("qdrant_client", reason="qdrant-client (requirements-extras.txt) is not installed")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize("k", [1, 7, 500])
def test_a_collection_agrees_with_exact_search(server, k, monkeypatch):
    monkeypatch.setattr(qdrant_gallery, "QUERY_ROWS", 3)
    vectors = (randn(300, 24, seed=1) * 5).half()
    upload(server.url, NAME, vectors, shards=2)
    gallery = QdrantGallery(server.url, NAME)
    assert_same_as_exact(gallery, randn(8, 24) - 0.2, vectors, k)
    assert gallery.search(torch.zeros(0, 24), 5)[1].shape == (0, 5)
    assert server.collections[NAME]["shards"] == 2
    assert sum(path.endswith("query/batch") for _, path in server.requests) == 3


def test_a_real_server_agrees_with_exact_search():
    url = os.environ.get("KIT_QDRANT_URL")
    if not url:
        pytest.skip("KIT_QDRANT_URL: no Qdrant server named; the stand-in alone was asked")
    client = pytest.importorskip("qdrant_client").QdrantClient(url=url, check_compatibility=False)
    client.delete_collection(NAME)
    try:
        vectors = randn(600, 24, seed=1) * 5
        upload(url, NAME, vectors)
        for k in (1, 7, 700):
            assert_same_as_exact(QdrantGallery(url, NAME), randn(8, 24) - 0.2, vectors, k)
    finally:
        client.delete_collection(NAME)


def test_what_a_search_by_graph_misses_is_marked(server):
    vectors = randn(10, 4, seed=1)
    upload(server.url, NAME, vectors)
    scores, rows = QdrantGallery(server.url, NAME, exact=False).search(randn(2, 4), 10)
    assert (rows[:, 5:] == -1).all() and (scores[:, 5:] == -torch.inf).all() and (rows[:, :5] >= 0).all()


def test_an_interrupted_upload_goes_on_where_it_stopped(server, monkeypatch, refuses):
    monkeypatch.setattr(qdrant_gallery, "UPLOAD_ROWS", 10)
    vectors, server.full_after = randn(45, 6, seed=1), 20
    with refuses(f"{server.url}: expected a Qdrant server that answers, found "):
        upload(server.url, NAME, vectors)
    server.full_after, before = None, len(server.requests)
    upload(server.url, NAME, vectors)
    assert [path for verb, path in server.requests[before:] if verb == "PUT"] == [
        f"/collections/{NAME}/points?wait=true"] * 3
    assert_same_as_exact(QdrantGallery(server.url, NAME), randn(3, 6), vectors, 9)


@pytest.mark.parametrize(("rows", "message"), [
    (3, "a new one, or the first of 3 rows, found 5 points"),
    (5, "a new one, or an unfinished upload of this gallery, found another point 4")])
def test_a_collection_with_other_contents_is_left_alone(server, refuses, rows, message):
    upload(server.url, NAME, randn(5, 4))
    held = dict(server.collections[NAME]["points"])
    with refuses(f"{server.url} collection {NAME}: expected {message}"):
        upload(server.url, NAME, randn(rows, 4, seed=1))
    assert server.collections[NAME]["points"] == held


def test_a_collection_that_is_not_there_or_compares_otherwise_is_named(server, refuses):
    with refuses(f"{server.url} collection {NAME}: expected it to be there and allowed, found status 404 Not Found"):
        QdrantGallery(server.url, NAME)
    upload(server.url, NAME, randn(5, 4))
    server.collections[NAME]["distance"] = "Euclid"
    with refuses("expected one vector a point, compared by cosine, found Euclid"):
        QdrantGallery(server.url, NAME)


def test_a_server_that_does_not_answer_is_named(refuses):
    pytest.importorskip("qdrant_client", reason="qdrant-client (requirements-extras.txt) is not installed")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    for call in (lambda: QdrantGallery(url, NAME), lambda: upload(url, NAME, randn(3, 4))):
        with refuses(f"^{url}: expected a Qdrant server that answers, found .*refused"):
            call()


@pytest.mark.parametrize("url", ["localhost:6333", ":memory:", "/tmp/folder"])
def test_only_a_url_is_a_server(refuses, url):
    with refuses(f"Qdrant server: expected a URL with http:// or https://, found {url}"):
        QdrantGallery(url, NAME)


def test_without_the_client_one_line_says_what_to_install(monkeypatch, refuses):
    monkeypatch.setitem(sys.modules, "qdrant_client", None)
    with refuses("^qdrant-client: expected to be installed .pip install -r requirements-extras.txt."):
        QdrantGallery("http://127.0.0.1:1", NAME)
