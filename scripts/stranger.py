#!/usr/bin/env python3
"""A stranger at a mesh's QUIC ports, by aioquic, which shares no code with ours.

    scripts/stranger.py HOST:PORT NAME... [--seconds 10] [--count N] [--bind ADDRESS]
    scripts/stranger.py --list
    scripts/stranger.py --fetch

Attacks, by name; `others` is all of them but `silent`:

  silent     300 connections that finish their handshake, say nothing more and come back when they are dropped
  half       connections that stop in the middle of the handshake
  streams    as many streams as it gets, a byte on each, and more than it gets
  garbage    random bytes in place of messages
  lengths    headers of messages that claim up to 4 GiB
  slow       a request to join, a byte a second
  tokens     requests to join with tokens that are guessed
  versions   packets of QUIC versions that nobody speaks, long and short ones
  alpn       protocols that nobody speaks
  nodes      the workers' protocol without a certificate
  impostor   the workers' protocol with a certificate of its own making
  churn      connections that are closed as soon as they are made
  classical  handshakes without ML-KEM, by X25519 alone and by NIST's curves

All but `classical` exchange keys by X25519MLKEM768 (draft-ietf-tls-ecdhe-mlkem), which aioquic lacks: it is added here, with OpenSSL's
ML-KEM.

What it sends is bounded; --count changes how many connections an attack has. At the end it prints one JSON object for each attack:
what it counted. Exit code 3: aioquic is not to be had here, and why was said. It is fetched by name into the cache, at the first use.
"""

import argparse
import asyncio
import datetime
import enum
import fcntl
import json
import os
import random
import shutil
import socket
import ssl
import struct
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parent.parent
CACHE = Path(os.environ.get("HYDRAMESH_CACHE") or ROOT / ".cache").resolve()
PACKAGE = "aioquic==1.7.2"
VENV = CACHE / "aioquic"
PYTHON = VENV / "bin/python"

JOIN, NODES = "hydramesh-join/1", "hydramesh/1"
HELLO, JOIN_REQUEST = 0x10, 0x30


def fetch():
    """The interpreter that has aioquic; leaves with 3 where there can be none."""
    stamp = VENV / "done"

    def is_there():
        if not (PYTHON.exists() and stamp.is_file() and stamp.read_text() == PACKAGE):
            return False
        modules = "import aioquic, cryptography.hazmat.primitives.asymmetric.mlkem"
        return subprocess.run([PYTHON, "-c", modules], stderr=subprocess.DEVNULL).returncode == 0

    if is_there():
        return
    CACHE.mkdir(parents=True, exist_ok=True)
    with open(CACHE / ".aioquic.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        # Another process may have fetched it meanwhile.
        if is_there():
            return
        print(f"stranger: {PACKAGE} into {VENV}", file=sys.stderr, flush=True)
        shutil.rmtree(VENV, ignore_errors=True)
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", PYTHON]
        for command in ([sys.executable, "-m", "venv", "--without-pip", VENV], [*pip, "install", "--quiet", PACKAGE]):
            done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=sys.stderr)
            if done.returncode != 0:
                print(f"stranger: skipped: {PACKAGE} is not to be had here (the words above say why)", file=sys.stderr)
                sys.exit(3)
        stamp.write_text(PACKAGE)


NAMES = ["silent", "half", "streams", "garbage", "lengths", "slow", "tokens", "versions", "alpn", "nodes", "impostor", "churn", "classical"]

if __name__ == "__main__":
    if sys.argv[1:] == ["--list"]:
        print("\n".join(NAMES))
        sys.exit(0)
    # Started again by the interpreter that has aioquic; this one only fetches it.
    if os.environ.get("STRANGER_VENV") != "1":
        fetch()
        if sys.argv[1:] == ["--fetch"]:
            sys.exit(0)
        os.execve(PYTHON, [PYTHON, *sys.argv], os.environ | {"STRANGER_VENV": "1"})

from aioquic import tls  # noqa: E402
from aioquic.quic.configuration import QuicConfiguration  # noqa: E402
from aioquic.quic.connection import QuicConnection  # noqa: E402
from aioquic.quic.events import (  # noqa: E402
    ConnectionTerminated,
    HandshakeCompleted,
    StreamDataReceived,
    StreamReset,
)
from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey  # noqa: E402
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey  # noqa: E402


class HybridPublic:
    """A share of X25519MLKEM768: of a client the key for encapsulation (1,184 bytes), of a server the ciphertext (1,088), then
    the key for X25519 (32)."""

    def __init__(self, share):
        self.share = share

    @classmethod
    def from_public_bytes(cls, share):
        return cls(share)

    def public_bytes(self, _encoding, _format):
        return self.share


class HybridPrivate:
    def __init__(self):
        self.lattice, self.curve = MLKEM768PrivateKey.generate(), X25519PrivateKey.generate()

    @classmethod
    def generate(cls):
        return cls()

    def public_key(self):
        return HybridPublic(self.lattice.public_key().public_bytes_raw() + self.curve.public_key().public_bytes_raw())

    def exchange(self, server):
        ciphertext, point = server.share[:1088], server.share[1088:]
        return self.lattice.decapsulate(ciphertext) + self.curve.exchange(X25519PublicKey.from_public_bytes(point))


# The hybrid takes X448's place, which no mesh speaks.
HYBRID = 0x11EC
tls.Group = enum.IntEnum("Group", {group.name: group.value for group in tls.Group} | {"X448": HYBRID})
tls.x448 = SimpleNamespace(X448PrivateKey=HybridPrivate, X448PublicKey=HybridPublic)


class Connection(QuicConnection):
    """A connection that offers these groups for the key exchange."""

    def __init__(self, groups, **arguments):
        super().__init__(**arguments)
        self.groups = groups

    def _initialize(self, peer_cid):
        super()._initialize(peer_cid)
        self.tls._supported_groups = self.groups


class Peer(asyncio.DatagramProtocol):
    """One connection on a socket of its own. `dumb` stops it from sending anything."""

    def __init__(self, target, alpn, bind, certificate=None, groups=(HYBRID,)):
        configuration = QuicConfiguration(
            is_client=True, alpn_protocols=[alpn], verify_mode=ssl.CERT_NONE, idle_timeout=60.0, server_name="hydramesh"
        )
        if certificate:
            configuration.load_cert_chain(*certificate)
        self.quic = Connection(groups, configuration=configuration)
        self.target, self.bind = target, bind
        self.connected, self.ended = asyncio.Event(), asyncio.Event()
        self.reason, self.streams_reset = None, 0
        self.answers = {}
        self.sent = self.received = 0
        self.dumb = False
        self.timer = None

    async def open(self):
        loop = asyncio.get_running_loop()
        await loop.create_datagram_endpoint(lambda: self, local_addr=(self.bind, 0))
        self.quic.connect(self.target, now=loop.time())
        self.flush()
        return self

    async def is_in(self, limit=5.0):
        """Whether the handshake is over within so many seconds, and nobody has hung up."""
        waits = [asyncio.ensure_future(event.wait()) for event in (self.connected, self.ended)]
        await asyncio.wait(waits, timeout=limit, return_when=asyncio.FIRST_COMPLETED)
        for wait in waits:
            wait.cancel()
        return self.connected.is_set() and not self.ended.is_set()

    async def stays(self, limit):
        """Whether the connection outlasts so many seconds."""
        try:
            await asyncio.wait_for(self.ended.wait(), limit)
            return False
        except asyncio.TimeoutError:
            return True

    def stream(self, data, end=False, stream=None):
        stream = self.quic.get_next_available_stream_id() if stream is None else stream
        self.quic.send_stream_data(stream, data, end_stream=end)
        self.flush()
        return stream

    def flush(self):
        loop = asyncio.get_running_loop()
        if self.dumb or self.transport.is_closing():
            return
        for data, _ in self.quic.datagrams_to_send(now=loop.time()):
            self.sent += len(data)
            self.transport.sendto(data, self.target)
        if self.timer:
            self.timer.cancel()
        due = self.quic.get_timer()
        self.timer = None if due is None else loop.call_at(due, self.tick)

    def tick(self):
        self.quic.handle_timer(now=asyncio.get_running_loop().time())
        self.look()
        self.flush()

    def look(self):
        while event := self.quic.next_event():
            if isinstance(event, HandshakeCompleted):
                self.connected.set()
            elif isinstance(event, StreamDataReceived):
                self.answers[event.stream_id] = self.answers.get(event.stream_id, b"") + event.data
            elif isinstance(event, StreamReset):
                self.streams_reset += 1
            elif isinstance(event, ConnectionTerminated):
                self.reason = f"{event.error_code:#x} {event.reason_phrase}"[:60]
                self.ended.set()

    def close(self):
        if not self.dumb and not self.ended.is_set():
            self.quic.close()
            self.flush()
        if self.timer:
            self.timer.cancel()
        self.transport.close()

    def connection_made(self, transport):
        self.transport = transport

    def datagram_received(self, data, address):
        self.received += len(data)
        if self.dumb:
            return
        self.quic.receive_datagram(data, address, now=asyncio.get_running_loop().time())
        self.look()
        self.flush()

    def error_received(self, error):
        # A closed port: whoever waits sees it by its limit.
        pass


class Stranger:
    def __init__(self, target, bind, seconds, count):
        self.target, self.bind, self.count = target, bind, count
        self.until = time.monotonic() + seconds
        self.counts = {}

    def left(self):
        return max(0.0, self.until - time.monotonic())

    async def peer(self, alpn=JOIN, certificate=None, groups=(HYBRID,)):
        return await Peer(self.target, alpn, self.bind, certificate, groups).open()

    async def many(self, usual, one, counts):
        """`one` again and again on so many connections, each mistake counted and none of them the end."""

        async def repeat(number):
            await asyncio.sleep(number * 0.005)
            while self.left():
                try:
                    await one(number)
                except (OSError, ValueError, AssertionError, RuntimeError) as error:
                    counts[f"own mistakes: {type(error).__name__} {error}"[:70]] += 1
                await asyncio.sleep(0.2)

        await asyncio.gather(*(repeat(number) for number in range(self.count or usual)))

    async def run(self, name):
        counts = self.counts[name] = Counter()
        try:
            await asyncio.wait_for(getattr(self, name)(counts), self.left() + 2)
        except asyncio.TimeoutError:
            pass

    async def silent(self, counts):
        async def one(_):
            peer = await self.peer()
            if await peer.is_in(10):
                counts["handshakes"] += 1
                await peer.stays(self.left())
                counts["dropped" if peer.ended.is_set() else "kept"] += 1
            else:
                counts[f"not in: {peer.reason}"] += 1
            peer.close()

        await self.many(300, one, counts)

    async def half(self, counts):
        async def one(number):
            peer = await self.peer()
            # Every other one stops before it has shown that it has its address: at most what it sent may come back.
            proven = number % 2 == 1
            for _ in range(50 if proven else 0):
                await asyncio.sleep(0.02)
                if peer.received:
                    break
            peer.dumb = True
            await asyncio.sleep(min(3.0, self.left()))
            address = "" if proven else " of an unproven address"
            counts[f"bytes sent{address}"] += peer.sent
            counts[f"bytes received{address}"] += peer.received
            counts["halves"] += 1
            peer.close()

        await self.many(40, one, counts)

    async def streams(self, counts):
        async def one(_):
            peer = await self.peer()
            if not await peer.is_in():
                counts[f"not in: {peer.reason}"] += 1
                return peer.close()
            for number in range(2_000):
                peer.quic.send_stream_data(4 * number, b"x")
                peer.quic.send_stream_data(4 * number + 2, b"x")
            peer.flush()
            await peer.stays(min(4.0, self.left()))
            counts["connections with 4,000 streams"] += 1
            counts["ended by the head"] += peer.ended.is_set()
            peer.close()

        await self.many(3, one, counts)

    async def garbage(self, counts):
        async def one(_):
            peer = await self.peer()
            if await peer.is_in():
                peer.stream(random.randbytes(random.randrange(1, 20_000)), end=random.random() < 0.5)
                await peer.stays(min(1.0, self.left()))
                counts["sent"] += 1
                counts["ended by the head"] += peer.ended.is_set() or peer.streams_reset > 0
            peer.close()

        await self.many(4, one, counts)

    async def lengths(self, counts):
        async def one(_):
            peer = await self.peer()
            if await peer.is_in():
                length = random.choice([0xFFFFFFFF, 0x7FFFFFFF, 64 << 20, (64 << 20) - 1, 1 << 20])
                stream = peer.stream(header(JOIN_REQUEST, length))
                for _ in range(20):
                    if await peer.stays(min(0.2, self.left())) is False:
                        break
                    try:
                        peer.stream(b"\x0a" * 1_000, stream=stream)
                    except (RuntimeError, ValueError):
                        # The head has stopped this stream.
                        break
                counts["sent"] += 1
                counts["ended by the head"] += peer.ended.is_set() or peer.streams_reset > 0
            peer.close()

        await self.many(4, one, counts)

    async def slow(self, counts):
        async def one(_):
            peer = await self.peer()
            if await peer.is_in():
                request = join_request()
                stream, begun = peer.stream(request[:1]), time.monotonic()
                for byte in request[1:]:
                    if not await peer.stays(min(1.0, self.left())) or not self.left():
                        break
                    try:
                        peer.stream(bytes([byte]), stream=stream)
                    except (RuntimeError, ValueError):
                        break
                held = time.monotonic() - begun
                counts["held for up to 10 s" if held < 10 else "held for longer"] += 1
            peer.close()

        await self.many(20, one, counts)

    async def tokens(self, counts):
        async def one(_):
            peer = await self.peer()
            if await peer.is_in():
                stream = peer.stream(join_request(), end=True)
                for _ in range(100):
                    await asyncio.sleep(0.02)
                    if stream in peer.answers or peer.ended.is_set():
                        break
                answer = peer.answers.get(stream, b"")
                kind = answer[0] if answer else None
                counts["JOINED" if kind == 0x31 else "refused" if kind == 0xFF else "no answer"] += 1
            peer.close()

        await self.many(2, one, counts)

    async def versions(self, counts):
        """Raw packets: unknown versions must not be answered with more than came, short ones not at all."""
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as raw:
            raw.bind((self.bind, 0))
            raw.setblocking(False)
            while self.left():
                for length in (1_200, 60):
                    version = random.choice([0x0A0A0A0A, 0x00000000, 0xFF00001D, 0x6B3343CF, 0xDEADBEEF])
                    ids = b"\x08" + random.randbytes(8)
                    packet = (b"\xc3" + struct.pack("!I", version) + ids + ids).ljust(length, b"\0")
                    try:
                        raw.sendto(packet, self.target)
                        counts["bytes sent"] += len(packet)
                    except OSError:
                        counts["not sent"] += 1
                await asyncio.sleep(0.05)
                while True:
                    try:
                        counts["bytes received"] += len(raw.recv(65_536))
                    except BlockingIOError:
                        break
                    except OSError:
                        counts["refused"] += 1
                        break

    async def alpn(self, counts):
        await self.refused(counts, "h3", None)

    async def nodes(self, counts):
        await self.refused(counts, NODES, None)

    async def impostor(self, counts):
        with tempfile.TemporaryDirectory(prefix="stranger-") as folder:
            await self.refused(counts, NODES, own_certificate(Path(folder)))

    async def refused(self, counts, alpn, certificate):
        async def one(_):
            peer = await self.peer(alpn, certificate)
            if await peer.is_in():
                # A client is done before the server has looked at its certificate.
                stream = peer.stream(header(HELLO, 4) + b"\x0a\x02me")
                await peer.stays(min(2.0, self.left()))
                welcome = peer.answers.get(stream, b"")[:1] == b"\x11"
                counts["WELCOMED" if welcome else "refused" if peer.ended.is_set() else "not answered"] += 1
            else:
                counts["refused" if peer.ended.is_set() else "not answered"] += 1
            peer.close()

        await self.many(3, one, counts)

    async def churn(self, counts):
        async def one(_):
            peer = await self.peer()
            counts["in" if await peer.is_in(2.0) else "not in"] += 1
            peer.close()

        await self.many(4, one, counts)

    async def classical(self, counts):
        async def one(number):
            groups = [tls.Group.X25519] if number % 2 else [tls.Group.SECP256R1, tls.Group.SECP384R1]
            peer = await self.peer(groups=groups)
            if await peer.is_in():
                counts["IN"] += 1
            else:
                counts["refused" if peer.ended.is_set() else "not answered"] += 1
            peer.close()

        await self.many(4, one, counts)


def header(kind, length):
    return struct.pack("!BIQI", kind, 1, int(time.time() * 1e6), length)


def join_request():
    """A well-formed request: a token that is guessed, and a certificate request that is noise."""

    def field(tag, value):
        return bytes([tag << 3 | 2]) + varint(len(value)) + value

    def varint(number):
        out = b""
        while number >= 0x80:
            out, number = out + bytes([number & 0x7F | 0x80]), number >> 7
        return out + bytes([number])

    body = field(1, random.randbytes(8).hex().encode()) + field(2, random.randbytes(32))
    body += field(3, random.randbytes(200)) + field(4, b"stranger")
    return header(JOIN_REQUEST, len(body)) + body


def own_certificate(folder):
    """A self-signed certificate and its key, as files."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "hydramesh worker")])
    now = datetime.datetime.now(datetime.timezone.utc)
    builder = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
    builder = builder.serial_number(x509.random_serial_number())
    builder = builder.not_valid_before(now - datetime.timedelta(days=1)).not_valid_after(now + datetime.timedelta(days=7))
    certificate = builder.sign(key, hashes.SHA256())
    paths = folder / "cert.pem", folder / "key.pem"
    paths[0].write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    private = serialization.PrivateFormat.PKCS8
    paths[1].write_bytes(key.private_bytes(serialization.Encoding.PEM, private, serialization.NoEncryption()))
    return paths


async def attack(arguments):
    host, _, port = arguments.target.rpartition(":")
    target = (host.strip("[]"), int(port))
    names = []
    for name in arguments.names:
        names += [other for other in NAMES if other != "silent"] if name == "others" else [name]
    stranger = Stranger(target, arguments.bind, arguments.seconds, arguments.count)
    await asyncio.gather(*(stranger.run(name) for name in names))
    for name in names:
        print(json.dumps({"attack": f"stranger:{name}", "counts": stranger.counts[name]}), flush=True)
    # Hundreds of sockets need no orderly end.
    os._exit(0)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", metavar="HOST:PORT")
    parser.add_argument("names", metavar="NAME", nargs="+", choices=[*NAMES, "others"])
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--count", type=int, default=0)
    parser.add_argument("--bind", default="0.0.0.0")
    asyncio.run(attack(parser.parse_args()))


if __name__ == "__main__":
    main()
