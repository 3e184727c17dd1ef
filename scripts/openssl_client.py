#!/usr/bin/env python3
"""An HTTPS client by OpenSSL, which shares no code with ours.

    scripts/openssl_client.py HOST:PORT PATH AUTHORITY.pem

Asks once with the groups that OpenSSL offers by itself, X25519MLKEM768 first, and once with the classical curve P-256 alone. Prints a
JSON object: for `hybrid` and `classical` the version of TLS, the group of the key exchange and the HTTP status, or the error. It runs
with the Python that scripts/stranger.py fetches. Exit code 3: that is not to be had here.
"""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

STRANGER = Path(__file__).resolve().parent / "stranger.py"
CACHE = Path(os.environ.get("HYDRAMESH_CACHE") or STRANGER.parent.parent / ".cache").resolve()
PYTHON = CACHE / "aioquic/bin/python"

if __name__ == "__main__" and os.environ.get("OPENSSL_CLIENT_VENV") != "1":
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    if (code := subprocess.run([sys.executable, STRANGER, "--fetch"]).returncode) != 0:
        sys.exit(code)
    os.execve(PYTHON, [PYTHON, *sys.argv], os.environ | {"OPENSSL_CLIENT_VENV": "1"})

from cryptography.hazmat.primitives.asymmetric import ec  # noqa: E402
from OpenSSL import SSL  # noqa: E402


def ask(host, port, path, authority, curve):
    context = SSL.Context(SSL.TLS_CLIENT_METHOD)
    context.load_verify_locations(authority)
    context.set_verify(SSL.VERIFY_PEER, lambda _connection, _certificate, _error, _depth, good: bool(good))
    if curve:
        context.set_tmp_ecdh(curve)
    with socket.create_connection((host, port), timeout=10) as plain:
        # pyOpenSSL has no time limits of its own: the socket blocks, and the kernel ends it.
        plain.settimeout(None)
        connection = SSL.Connection(context, plain)
        connection.set_connect_state()
        try:
            connection.do_handshake()
            connection.sendall(f"GET {path} HTTP/1.1\r\nHost: {host}:{port}\r\nConnection: close\r\n\r\n".encode())
            status = int(connection.recv(4096).split(b" ")[1])
        except SSL.Error as error:
            return {"error": repr(error)}
        return {"version": connection.get_protocol_version_name(), "group": connection.get_group_name(), "status": status}


if __name__ == "__main__":
    address, path, authority = sys.argv[1:]
    host, _, port = address.rpartition(":")
    asked = {"hybrid": None, "classical": ec.SECP256R1()}
    print(json.dumps({name: ask(host, int(port), path, authority, curve) for name, curve in asked.items()}))
