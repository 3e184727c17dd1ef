"""A small reverse proxy between a foreign suite and a head: it maps paths, model names and launch options, nothing else.

What the head answers reaches the suite as it is, status and headers included; only the names of models are mapped back.
"""

import http.client
import json
import select
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding", "content-length", "te", "trailer", "upgrade", "host"}


class Mapping:
    """How a suite's requests become ours. The base class maps nothing."""

    def path(self, method, path):
        """Our path for theirs."""
        return path

    def request(self, path, body):
        """Our JSON body for theirs; `path` is theirs."""
        return body

    def response(self, path, body, sent):
        """Their JSON body, or chunk of a stream, for ours; `sent` is the body that the suite sent. None is left out."""
        return body


class Gateway:
    """A running proxy to `address` (host:port)."""

    def __init__(self, address, mapping, port=0):
        self.address = address
        self.mapping = mapping
        gateway = self

        class Handler(Handle):
            owner = gateway

        self.server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self.server.daemon_threads = True
        self.port = self.server.server_address[1]
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()

    def stop(self):
        self.server.shutdown()
        self.server.server_close()


class Handle(BaseHTTPRequestHandler):
    """One connection of the suite."""

    protocol_version = "HTTP/1.1"
    owner: Gateway

    def log_message(self, *_):
        pass

    def forward(self):
        mapping = self.owner.mapping
        theirs, _, query = self.path.partition("?")
        length = int(self.headers.get("content-length") or 0)
        body = self.rfile.read(length)
        sent = parsed(body) if self.headers.get_content_type() == "application/json" else None
        if isinstance(sent, dict):
            body = json.dumps(mapping.request(theirs, dict(sent))).encode()
        path = mapping.path(self.command, theirs) + ("?" + query if query else "")
        connection = http.client.HTTPConnection(self.owner.address, timeout=120)
        done = threading.Event()
        try:
            connection.putrequest(self.command, path, skip_accept_encoding=True)
            for name, value in self.headers.items():
                if name.lower() not in HOP_BY_HOP and name.lower() != "accept-encoding":
                    connection.putheader(name, value)
            connection.putheader("content-length", str(len(body)))
            connection.endheaders(body)
            threading.Thread(target=self.watch, args=(connection.sock, done), daemon=True).start()
            answer = connection.getresponse()
            if answer.headers.get_content_type() == "text/event-stream":
                self.stream(answer, theirs, sent)
            else:
                self.whole(answer, theirs, sent)
        except (OSError, http.client.HTTPException, ValueError):
            # The suite left, or the head did; closing tells the other one.
            self.close_connection = True
        finally:
            done.set()
            connection.close()

    def watch(self, upstream, done):
        """Closes the connection to the head when the suite closes its own, so that the head sees a client leave."""
        while not done.is_set():
            try:
                readable, _, _ = select.select([self.connection], [], [], 0.1)
                if readable and not done.is_set():
                    if not self.connection.recv(1, socket.MSG_PEEK):
                        upstream.shutdown(socket.SHUT_RDWR)
                    return
            except (OSError, ValueError):
                return

    do_GET = do_POST = do_PUT = do_DELETE = do_OPTIONS = do_HEAD = do_PATCH = forward

    def head_of(self, answer, more):
        self.send_response(answer.status, answer.reason)
        for name, value in answer.getheaders():
            if name.lower() not in HOP_BY_HOP:
                self.send_header(name, value)
        for name, value in more.items():
            self.send_header(name, value)
        self.end_headers()

    def whole(self, answer, path, sent):
        body = answer.read()
        if answer.headers.get_content_type() == "application/json" and (found := parsed(body)) is not None:
            body = json.dumps(self.owner.mapping.response(path, found, sent)).encode()
        self.head_of(answer, {"content-length": str(len(body))})
        if self.command != "HEAD":
            self.wfile.write(body)

    def stream(self, answer, path, sent):
        self.close_connection = True
        self.head_of(answer, {"connection": "close"})
        for line in answer:
            if line.startswith(b"data: ") and (chunk := parsed(line[6:])) is not None:
                chunk = self.owner.mapping.response(path, chunk, sent)
                if chunk is None:
                    continue
                line = b"data: " + json.dumps(chunk).encode() + b"\n"
            self.wfile.write(line)
            if line == b"\n":
                self.wfile.flush()


def parsed(text):
    try:
        return json.loads(text)
    except ValueError:
        return None
