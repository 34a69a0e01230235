"""Servers: a plain one, a real nginx, a proxy that fails on purpose, and one for wandb that falls silent."""

from __future__ import annotations

import contextlib
import gzip
import itertools
import json
import os
import shutil
import socket
import struct
import subprocess
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

FAULTS = ("reset", "stall", "cut", "5xx")


@dataclass
class Served:
    """A server that runs."""

    url: str
    requests: Counter[str] = field(default_factory=Counter)
    """How often each path was asked for."""
    faults: Counter[str] = field(default_factory=Counter)
    """How often each fault was made."""


@contextlib.contextmanager
def serve(folder: Path) -> Iterator[Served]:
    """A plain HTTP server of a folder."""
    served = Served("")

    class Handler(SimpleHTTPRequestHandler):
        def do_GET(self) -> None:
            served.requests[self.path] += 1
            super().do_GET()

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with _running(partial(Handler, directory=str(folder)), served):
        yield served


@contextlib.contextmanager
def faulty(
    upstream: str,
    share: float = 0.2,
    kinds: tuple[str, ...] = FAULTS,
    *,
    only: str = "",
    stall: float = 1.0,
) -> Iterator[Served]:
    """A proxy of `upstream` that fails at that share of the requests, evenly, in one of the ways `kinds` by turns.

    `only`: counts and fails only where the path ends so. `stall`: seconds without a byte in mid-answer.
    """
    served, numbers, lock = Served(""), itertools.count(1), threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            with lock:
                served.requests[self.path] += 1
                number = next(numbers) if self.path.endswith(only) else 0
                fails = int(number * share) > int((number - 1) * share)
                fault = kinds[served.faults.total() % len(kinds)] if number and fails else None
                served.faults.update([fault] if fault else [])
            if fault == "5xx":
                self.send_error(503)
                return
            with urllib.request.urlopen(upstream + self.path) as answer:
                body = answer.read()
            if fault == "reset":  # lingering for no time at all: the other side gets a reset
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.connection.close()
                return
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if fault in ("stall", "cut"):
                self.wfile.write(body[: len(body) // 2])
                self.wfile.flush()
                time.sleep(stall if fault == "stall" else 0)
                self.close_connection = True
                return
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with _running(Handler, served):
        yield served


@contextlib.contextmanager
def _running(handler: Any, served: Served) -> Iterator[None]:
    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, request: Any, client_address: Any) -> None:
            pass  # a client that has gone

    with Server(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        served.url = f"http://127.0.0.1:{server.server_address[1]}"
        try:
            yield
        finally:
            server.shutdown()


NGINX = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")


@contextlib.contextmanager
def nginx(folder: Path, work: Path) -> Iterator[Served]:
    """A real nginx of a folder, on a free port; its requests are those of its log when the block ends."""
    assert NGINX
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = work / "access.log"
    (work / "nginx.conf").write_text(
        f"daemon off; pid {work}/pid; error_log {work}/error.log; worker_processes 1;\n"
        + ("user root;\n" if os.geteuid() == 0 else "")
        + "events {}\n"
        f"http {{ log_format path '$request_uri'; access_log {log} path;\n"
        + "".join(f"{kind}_temp_path {work}/{kind};\n" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi"))
        + f"server {{ listen 127.0.0.1:{port}; root {folder}; }} }}\n"
    )
    server = subprocess.Popen([NGINX, "-p", work, "-c", work / "nginx.conf"], stderr=subprocess.DEVNULL)
    served = Served(f"http://127.0.0.1:{port}")
    try:
        until = time.monotonic() + 10
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            except OSError:
                assert server.poll() is None, (work / "error.log").read_text()
                assert time.monotonic() < until, "nginx does not answer"
                time.sleep(0.05)
        yield served
    finally:
        server.terminate()
        server.wait(10)
        served.requests.update(log.read_text().split())


@contextlib.contextmanager
def wandb_server(*, answers: int = 10**9, status: int = 200) -> Iterator[Served]:
    """As much of wandb's server as a run needs: it answers so many requests, with `status`, and then falls silent."""
    served, ended = Served(""), threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            served.requests[self.path.rpartition("/")[2]] += 1
            if served.requests.total() > answers:
                ended.wait()
                self.close_connection = True
                return
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if self.headers.get("Content-Encoding") == "gzip":
                body = gzip.decompress(body)
            answer = self.data(json.loads(body)) if self.path == "/graphql" else {}
            text = json.dumps({"data": answer}).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        do_GET = do_PUT = do_POST  # noqa: N815  the names that the base class calls

        def data(self, body: dict[str, Any]) -> dict[str, Any]:
            query = body["query"]
            project = {"id": "p", "name": "isicdist", "entity": {"id": "e", "name": "someone"}}
            bucket = {"id": "b", "name": "run", "displayName": "run", "project": project, "historyLineCount": 0}
            if "upsertBucket" in query:
                return {
                    "upsertBucket": {"bucket": {**bucket, "config": "{}", "summaryMetrics": "{}"}, "inserted": True}
                }
            if "createRunFiles" in query:
                files = [{"name": name, "uploadUrl": f"{served.url}/upload"} for name in body["variables"]["files"]]
                return {"createRunFiles": {"runID": "b", "uploadHeaders": [], "files": files}}
            return {"model": {"bucket": None}}  # there is no run of that name yet

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with _running(Handler, served):
        try:
            yield served
        finally:
            ended.set()
