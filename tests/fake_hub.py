"""A Hugging Face hub in a thread: files by range, and the calls of an upload. Keeps every request."""
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class FakeHub:
    """files: (repo, name) -> content; large: names that it keeps as large files, with their SHA-256 as tag."""

    def __init__(self):
        self.files, self.large, self.wrong_sum, self.cut = {}, set(), set(), {}
        self.requests, self.bodies, self.created, self.commits, self.stored = [], [], [], {}, {}
        self.there, self.private = [], True  # names in the repository before an upload, and whether it is hidden
        self.refuse = None  # (status, message) of every call
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.server.daemon_threads = True
        self.address = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def close(self):
        self.server.shutdown()
        self.server.server_close()

    def tag(self, name, content):
        if name in self.wrong_sum:
            return "f" * 64
        if name in self.large:
            return hashlib.sha256(content).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.answer_file(body=False)

    def do_GET(self):
        self.answer_file(body=True)

    def answer_file(self, body):
        self.hub.requests.append((self.command, self.path, dict(self.headers)))
        if self.path.startswith("/api/models/"):
            return self.answer_repository()
        repo, _, rest = unquote(self.path.lstrip("/")).partition("/resolve/")
        revision, _, name = rest.partition("/")
        content = self.hub.files.get((repo, name))
        if self.hub.refuse or content is None or revision not in ("main", COMMIT):
            return self.send(*(self.hub.refuse or (404, "no such file")), body=body)
        start = int(self.headers.get("Range", "bytes=0-")[6:].split("-")[0])
        self.send_response(206 if "Range" in self.headers else 200)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{self.hub.tag(name, content)}"')
        self.send_header("Content-Length", str(len(content) - start))
        if "Range" in self.headers:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        if body:
            end = self.hub.cut.pop(name, None)  # the connection ends there, once
            self.wfile.write(content[start:end])
            self.close_connection = end is not None

    def answer_repository(self):
        if self.hub.refuse:
            return self.send(*self.hub.refuse)
        if "/tree/" in self.path:
            return self.send(200, [{"type": "file", "path": name, "size": 1, "oid": "0" * 40}
                                   for name in self.hub.there])
        return self.send(200, {"id": "org/name", "private": self.hub.private, "sha": COMMIT,
                               "siblings": [{"rfilename": name} for name in self.hub.there]})

    def do_POST(self):
        body = self.body()
        self.hub.requests.append((self.command, self.path, dict(self.headers)))
        self.hub.bodies.append(body)
        if self.hub.refuse:
            return self.send(*self.hub.refuse)
        if self.path == "/api/repos/create":
            found = json.loads(body)
            self.hub.created.append(found)
            owner = found.get("organization", "me")
            return self.send(200, {"url": f"{self.hub.address}/{owner}/{found['name']}"})
        if "/preupload/" in self.path:
            files = [{"path": f["path"], "uploadMode": "lfs" if f["path"] in self.hub.large else "regular",
                      "shouldIgnore": False} for f in json.loads(body)["files"]]
            return self.send(200, {"files": files})
        if self.path.endswith("/info/lfs/objects/batch"):
            objects = [{"oid": f["oid"], "size": f["size"], "authenticated": True, "actions": {
                "upload": {"href": f"{self.hub.address}/store/{f['oid']}", "header": {}}}}
                for f in json.loads(body)["objects"]]
            return self.send(200, {"transfer": "basic", "objects": objects})
        if "/commit/" in self.path:
            self.hub.commits[self.path] = [json.loads(line) for line in body.splitlines() if line.strip()]
            repo = self.path.split("/api/models/")[1].split("/commit/")[0]
            return self.send(200, {"success": True, "commitOid": COMMIT,
                                   "commitUrl": f"{self.hub.address}/{repo}/commit/{COMMIT}"})
        return self.send(404, f"no answer for {self.path}")

    def do_PUT(self):
        self.hub.stored[self.path.rsplit("/", 1)[1]] = self.body()
        self.send(200, {})

    def body(self):
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        content = b""
        while size := int(self.rfile.readline(), 16):
            content += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return content

    def send(self, status, content, body=True):
        text = json.dumps({"error": content} if isinstance(content, str) else content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        if isinstance(content, str):
            self.send_header("X-Error-Message", content)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        if body:
            self.wfile.write(text)
