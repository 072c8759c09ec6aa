"""Uploading a student to the hub: a stand-in of its HTTP API takes what its own client sends."""

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from huggingface_hub import constants

import eval as judge
from experiment.run import Run


class Hub(BaseHTTPRequestHandler):
    """What a client needs for a commit of small files."""

    def do_POST(self):
        body = self.body().decode()
        self.server.seen.append((self.path, self.headers.get("Authorization"), body))
        url = f"http://127.0.0.1:{self.server.server_port}"
        answers = {
            "create": {"url": f"{url}/org/toy", "name": "org/toy", "id": "1"},
            "preupload/main": {
                "files": [
                    {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                    for file in (json.loads(body)["files"] if "preupload" in self.path else [])
                ]
            },
            "validate-yaml": {"errors": [], "warnings": []},
            "commit/main": {
                "commitOid": "a" * 40,
                "commitUrl": f"{url}/org/toy/commit/{'a' * 40}",
                "hookOutput": "",
            },
        }
        self.answer(
            next(a for path, a in answers.items() if self.path.split("?")[0].endswith(path))
        )

    def body(self):
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers["Content-Length"] or 0))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def do_GET(self):
        self.answer({"siblings": [], "sha": "b" * 40, "id": "org/toy"})

    def answer(self, content):
        status = 401 if self.server.refuses else 200
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(monkeypatch):
    server = HTTPServer(("127.0.0.1", 0), Hub)
    server.seen, server.refuses = [], False
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)  # other tests reach nothing
    yield server
    server.shutdown()
    server.server_close()


def test_a_student_is_uploaded_with_its_card_and_nothing_else(hub, tiny_run, capsys):
    assert judge.main([str(tiny_run), "--push", "org/toy", "--student", "written"]) == 0
    assert "is at http://127.0.0.1" in capsys.readouterr().out
    created = next(json.loads(body) for path, _, body in hub.seen if path.endswith("create"))
    assert created["name"] == "toy"
    assert created.get("visibility") == "private" or created.get("private") is True
    assert all(token == "Bearer hf_test" for _, token, _ in hub.seen)
    commit = next(body for path, _, body in hub.seen if "commit" in path)
    sent = {
        line["value"]["path"]: base64.b64decode(line["value"]["content"])
        for line in map(json.loads, commit.splitlines())
        if line["key"] == "file"
    }
    folder = Run(tiny_run).folder / "students" / "written" / "seed-0"
    assert sent == {file.name: file.read_bytes() for file in folder.iterdir()}
    assert "README.md" in sent


def test_a_refusal_of_the_hub_and_an_unknown_student_are_one_line(hub, tiny_run, capsys):
    hub.refuses = True
    assert judge.main([str(tiny_run), "--push", "org/toy"]) == 2
    error = capsys.readouterr().err.strip()
    assert "org/toy was not uploaded" in error
    assert "set HF_TOKEN" in error
    assert len(error.splitlines()) == 1
    assert judge.main([str(tiny_run), "--push", "org/toy", "--student", "writen"]) == 2
    assert "did you mean 'written'?" in capsys.readouterr().err
