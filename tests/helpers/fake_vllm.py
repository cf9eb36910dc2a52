"""A stand-in for the serving environment's Python: `write` makes a program that takes vLLM's arguments and answers.

It writes its arguments and its pid to `started.json` beside it. With `--fake ends` it ends at once, with `--fake
broken` it answers requests with a fault.
"""

from __future__ import annotations

import sys
from pathlib import Path

PROGRAM = """#!{python}
import http.server, json, os, pathlib, subprocess, sys
words = sys.argv[1:]
def value(name, default=None):
    return words[words.index(name) + 1] if name in words else default
if value("--fake") == "ends":
    sys.exit("out of memory, or so")
helper = subprocess.Popen(["sleep", "1000"])
started = {{"words": words, "pids": [os.getpid(), helper.pid], "environment": dict(os.environ)}}
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.answer(200 if self.path == "/health" else 404, {{}})
    def do_POST(self):
        content = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if value("--fake") == "broken":
            return self.answer(400, {{"message": "no such model"}})
        text = "content" if "messages" in content else "text"
        choice = {{"message": {{"content": " answer"}}}} if "messages" in content else {{"text": " answer"}}
        self.answer(200, {{"choices": [choice], "usage": {{"completion_tokens": content["max_tokens"]}}}})
    def answer(self, status, content):
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def log_message(self, *_):
        pass
server = http.server.HTTPServer((value("--host"), int(value("--port"))), Handler)
pathlib.Path(__file__).with_name("started.json").write_text(json.dumps(started))
server.serve_forever()
"""


def write(folder: Path) -> Path:
    """Write the program; return its path."""
    program = folder / "python"
    program.write_text(PROGRAM.format(python=sys.executable))
    program.chmod(0o755)
    return program
