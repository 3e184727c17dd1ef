"""Runs inside the guest as the last unit of its boot: presses keys at the live image's console, reads its screen, plugs a stick in.

Says what it saw on standard output; the first line of /result is PASS or the step that failed.
"""

import fcntl
import os
import re
import subprocess
import sys
import time
from pathlib import Path

TIOCSTI = 0x5412
PARTITION = Path("/run/hydramesh-partition")
STATE = Path("/var/lib/private/hydramesh")
# Everything is given several times as long as the boot has taken: without KVM that can be minutes.
PATIENCE = 60 + 3 * float(Path("/proc/uptime").read_text().split()[0])
TOKEN = re.compile(r"hydra1\.[A-Za-z0-9_-]{80}")


class Failed(Exception):
    """A step that did not go as it should."""


def sh(command):
    return subprocess.run(command, shell=True, capture_output=True, text=True).stdout.strip()


def step(text):
    step.now = text
    print(f"== {text} ({sh('cut -d. -f1 /proc/uptime')} s)", flush=True)


def screen():
    cells = Path("/dev/vcs1").read_bytes().decode("latin1")
    columns = int(sh("stty -F /dev/tty1 size").split()[1])
    lines = (cells[start : start + columns].rstrip() for start in range(0, len(cells), columns))
    return "\n".join(line for line in lines if line)


def wrapped():
    """The screen as one line, for what is longer than a line of it."""
    return screen().replace("\n", "")


def press(text):
    legacy = Path("/proc/sys/dev/tty/legacy_tiocsti")
    if legacy.exists():
        legacy.write_text("1")
    tty = os.open("/dev/tty1", os.O_RDWR | os.O_NOCTTY)
    for character in text:
        fcntl.ioctl(tty, TIOCSTI, character.encode())
        # A terminal's queue is finite.
        time.sleep(0.01)
    os.close(tty)


def wait(what, holds):
    end = time.monotonic() + PATIENCE
    while not holds():
        if time.monotonic() > end:
            raise Failed(f"{what} did not come to pass in {PATIENCE:.0f} s")
        time.sleep(0.5)


def shows(text):
    wait(f"{text!r} on the screen", lambda: text in screen())


def check(what, holds):
    if not holds:
        raise Failed(what)


def active(unit):
    return sh(f"systemctl is-active {unit}") == "active"


def menu():
    """Back at the list of keys, whatever was asked."""
    wait("the list of keys", lambda: "power off" in screen() and screen().rstrip().endswith(">"))


def layout():
    """What the key right of T types: z on a German keyboard, y on others."""
    return sh("dumpkeys --console=/dev/tty1 --keys-only | awk '$1 == \"keycode\" && $2 == 21 { print $4; exit }'").lstrip("+")


def test():
    print(sh("systemctl --version | head -n 1"), f"patience {PATIENCE:.0f} s")

    step("the first console tells what is missing, and is no login")
    shows("HydraMesh on")
    menu()
    shows("Missing: the head's address")
    check("getty@tty1 runs", not active("getty@tty1.service"))
    check("a service runs without being told to", not active("hydramesh-worker-cpu.service"))

    step("the keyboard layout of the command line counts, and key k takes another")
    wait("a German layout", lambda: layout() == "z")
    press("k")
    shows("keyboard layout, such as")
    press("us\n")
    wait("an American layout", lambda: layout() == "y")
    menu()
    press("k")
    shows("keyboard layout, such as")
    press("../etc/shadow\n")
    shows("There is no keyboard layout ../etc/shadow")
    press("\n")
    menu()

    step("HYDRASTATE is mounted, below a folder for root alone")
    check("HYDRASTATE is not mounted", sh(f"findmnt -n -o LABEL {STATE}") == "HYDRASTATE")
    check("mode of /var/lib/private", sh("stat -c %a /var/lib/private") == "700")

    step("a stick that is plugged in counts at once")
    # A network with another machine in it, which a namespace stands for.
    sh(
        "ip netns add other; ip link add lan type veth peer name lan netns other; "
        "ip address add 192.0.2.7/24 dev lan; ip link set lan up; ip -n other link set lo up; "
        "ip -n other address add 192.0.2.9/24 dev lan; ip -n other link set lan up"
    )
    check("there is no network", "192.0.2.7" in sh("ip -brief address show dev lan"))
    loop = sh("losetup --find --show /stick")
    wait("the stick's partition", PARTITION.is_mount)
    shows("Models: SmolLM2-135M-Instruct.Q4_1.gguf")
    check("the partition can be written to", "ro" in sh(f"findmnt -n -o OPTIONS {PARTITION}").split(","))

    step("a worker cannot make tokens")
    menu()
    press("t")
    shows("Only a head makes tokens")
    press("\n")
    menu()

    step("key h makes it a head")
    press("h")
    wait("a question, or the head", lambda: "Type yes" in screen() or active("hydramesh-head.service"))
    press("yes\n")
    # sshd does not exist here, and nothing may hang on that.
    wait("the head", lambda: active("hydramesh-head.service"))
    shows("hydramesh.head=192.0.2.7:7780")
    check("its state is not on HYDRASTATE", (STATE / "head").is_dir())

    step("key t shows a token")
    menu()
    press("t")
    wait("a token", lambda: TOKEN.search(wrapped()))
    press("\n")
    wait("a screen without the token", lambda: not TOKEN.search(wrapped()))
    menu()

    step("key w writes a token and the head's address to the stick")
    press("w")
    shows("Plug the stick into one machine")
    check("no token", TOKEN.fullmatch((PARTITION / "join-token").read_text().strip()))
    settings = (PARTITION / "hydramesh.toml").read_text()
    check(f"hydramesh.toml: {settings}", settings == 'head = "192.0.2.7:7780"\n')
    check("the partition can still be written to", "ro" in sh(f"findmnt -n -o OPTIONS {PARTITION}").split(","))
    press("\n")
    menu()

    step("key f forgets, and another machine is the head")
    press("f")
    wait("the end of the head", lambda: not active("hydramesh-head.service"))
    menu()
    # The token on the stick is not for that one.
    there = "--property NetworkNamespacePath=/run/netns/other"
    sh(
        f"systemd-run --unit other-head --property Type=notify {there} "
        "/opt/hydramesh/bin/mesh-head --state-dir /root/other-head"
    )
    wait("the other head", lambda: active("other-head.service"))
    token = sh("ip netns exec other /opt/hydramesh/bin/hydramesh token create --state-dir /root/other-head")
    check(f"no token from the other head: {token}", TOKEN.fullmatch(token))

    step("a token is shown while it is typed, and a malformed one is asked for again")
    menu()
    press("j")
    shows("The head's address")
    press("192.0.2.9:7780\n")
    shows("Token (empty")
    press("not-a-token\n")
    shows("This has 11 characters")
    unknown = "hydra1." + "A" * 80
    press(unknown)
    wait("the typed token on the screen", lambda: unknown in wrapped())
    press("\n")

    step("a token that the head does not know is no way in, and the screen says so")
    wait("a screen without the token", lambda: unknown not in wrapped())
    menu()
    shows("hydramesh-worker-cpu.service does not run yet")
    check("it has a certificate", not (STATE / "worker/node.crt").exists())
    check("mode of the typed file", sh("stat -c %a /run/hydramesh-typed") == "600")
    check("mode of the token", sh("stat -c %a /run/hydramesh/join-token") == "600")

    step("a good token is")
    menu()
    press("j")
    shows("The head's address")
    press("192.0.2.9:7780\n")
    shows("Token (empty")
    press(token + "\n")
    wait("the worker's certificate", (STATE / "worker/node.crt").exists)
    secret = sh(f"journalctl --boot --no-pager --output=cat | grep -c {token}")
    check("the token is in the journal", secret == "0")

    step("a short code brings head and token over the network")
    press("f")
    wait("nothing to do", lambda: not active("hydramesh-worker-cpu.service"))
    sh(
        f"systemd-run --unit offer --property StandardOutput=file:/run/code {there} "
        "/opt/hydramesh/bin/hydramesh token offer --state-dir /root/other-head"
    )
    wait("a code", lambda: Path("/run/code").exists() and len(Path("/run/code").read_text()) > 10)
    menu()
    press("c")
    shows("The code that the head shows")
    press("22222-22222\n")
    shows("the code is wrong")
    press("\n")
    menu()
    press("c")
    shows("The code that the head shows")
    press(Path("/run/code").read_text().lower())
    typed_file = Path("/run/hydramesh-typed")
    wait("a token by the code", lambda: typed_file.exists() and TOKEN.search(typed_file.read_text()))
    typed = typed_file.read_text()
    check(f"its head: {typed.splitlines()[1]}", "head=192.0.2.9:7780" in typed)
    wait("the end of the offer", lambda: not active("offer.service"))

    step("the log is on key g")
    menu()
    press("g")
    shows("Enter goes back")
    press("\n")
    menu()

    step("a pulled stick is missed when somebody looks again")
    press("f")
    wait("nothing to do", lambda: not active("hydramesh-worker-cpu.service"))
    # A loop device stays while a file on it is open, other than a stick that is pulled.
    sh("systemctl stop hydramesh-worker-cpu.service")
    sh(f"umount --lazy {PARTITION}; losetup --detach {loop}")
    wait("the stick to be gone", lambda: not Path("/dev/disk/by-label/HYDRAMESH").exists())
    menu()
    press("l")
    shows("Missing: a model")


def main():
    step("boot")
    try:
        test()
    except (Failed, OSError, subprocess.SubprocessError) as error:
        print(f"FAILED at: {step.now}: {error}\n--- screen\n{screen()}\n--- journal")
        print(sh("journalctl --boot --no-pager --lines 60 --output=short-monotonic"))
        print(sh("systemctl list-units 'hydramesh*' --all --no-legend --no-pager; ls -la /run/hydramesh; systemctl list-jobs --no-pager"))
        Path("/result").write_text(f"{step.now}: {error}\n")
        sys.exit(1)
    Path("/result").write_text("PASS\n")


main()
