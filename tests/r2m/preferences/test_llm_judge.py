"""examples/llm_judge.py against a stand-in for an OpenAI-compatible server."""

import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from r2m.names import load_function
from r2m.preferences.labellers import Pair

pytest.importorskip("openai", reason="openai is not installed: pip install openai")

EXAMPLE = Path(__file__).parents[3] / "examples" / "llm_judge.py"
PAIRS = [Pair("q", "long text", "x", 1), Pair([{"role": "user", "content": "q"}], "y", "long text", 1)]


@pytest.fixture
def server(monkeypatch):
    """Answers by `server.verdict(request, first, second)`; `server.asked` has the requests."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            server.asked.append(asked)
            parts = re.findall(r"<(?:request|response_[AB])>\n(.*?)\n</", asked["messages"][0]["content"], re.DOTALL)
            message = {"role": "assistant", "content": server.verdict(*parts)}
            choice = {"index": 0, "message": message, "finish_reason": "stop"}
            known = message["content"] is not None
            body = json.dumps({"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]})
            self.send_response(200 if known else 500)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.asked = []
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setenv("OPENAI_BASE_URL", f"http://127.0.0.1:{server.server_port}/v1")
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    monkeypatch.setenv("JUDGE_MODEL", "m")
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def judge(monkeypatch, **environment):
    for name, value in environment.items():
        monkeypatch.setenv(name, str(value))
    return load_function("labeller", f"{EXAMPLE}:label")


def test_a_verdict_is_the_mean_of_both_orders(server, monkeypatch):
    server.verdict = lambda prompt, first, second: "A." if len(first) > len(second) else "It is B"
    assert judge(monkeypatch)(PAIRS) == [1.0, 0.0]
    assert len(server.asked) == 4
    assert any("user: q" in asked["messages"][0]["content"] for asked in server.asked)
    server.verdict = lambda prompt, first, second: "A"  # a judge that prefers a place
    assert judge(monkeypatch)(PAIRS) == [0.5, 0.5]
    server.verdict = lambda prompt, first, second: "I cannot say" if first == "x" else "tie"
    assert judge(monkeypatch)(PAIRS) == [None, 0.5]


def test_calls_of_a_run_are_bounded(server, monkeypatch, capsys):
    server.verdict = lambda prompt, first, second: "tie"
    label = judge(monkeypatch, JUDGE_CALLS=5)
    assert [label(PAIRS[:1]), label(PAIRS)] == [[0.5], [0.5, None]]
    assert len(server.asked) == 4
    assert "JUDGE_CALLS = 5 are spent; 1 pairs get no label" in capsys.readouterr().out


def test_a_call_that_takes_too_long_gives_no_label(server, monkeypatch):
    over = threading.Event()
    server.verdict = lambda prompt, first, second: over.wait(60) and "A" if first == "x" else "A"
    assert judge(monkeypatch, JUDGE_SECONDS=0.5)(PAIRS) == [None, 0.5]
    over.set()


def test_an_error_of_the_server_is_the_labellers(server, monkeypatch):
    server.verdict = lambda prompt, first, second: None
    with pytest.raises(Exception, match="500"):
        judge(monkeypatch)(PAIRS)
