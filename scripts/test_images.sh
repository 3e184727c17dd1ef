#!/usr/bin/env bash
# Runs the images' configurations for real: taken from images/config.nix by evaluation, put onto a Debian base with our release
# programs, and started under podman as a careful operator starts them.
#
# Shown is that a head, a shim and a worker, each in a container with a read-only root, no capabilities and uid 10001, are healthy
# within 30 s, that the worker joins with its token file, and that it answers through the head and the shim.
#
# It needs root, podman, crun, mmdebstrap (tini comes with the base), nix-instantiate, iproute2, the release programs (`make build`)
# and the cache (`make fetch`). What is missing is named and the test skipped; HYDRAMESH_TEST_IMAGES=required makes that an error.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
cache=${HYDRAMESH_CACHE:-$root/.cache}
bin=${HYDRAMESH_BIN_DIR:-${CARGO_TARGET_DIR:-$root/rust/target}/release}
ort=${HYDRAMESH_ORT:-$cache/onnxruntime/libonnxruntime.so.1.24.4}
model=SmolLM2-135M-Instruct.Q4_1
id=10001

skip() { # skip <reason>
    if [ "${HYDRAMESH_TEST_IMAGES:-}" = required ]; then
        echo "test_images: FAILED: $1" >&2
        exit 1
    fi
    echo "test_images: SKIPPED, nothing was tested: $1"
    exit 0
}
fail() { # fail <what>
    echo "test_images: FAILED: $1" >&2
    for name in head shim worker; do
        echo "--- the last words of $name:" >&2
        pod logs --tail 30 "$name" >&2 || true
    done
    exit 1
}
say() { echo "test_images: $1"; }

[ "$(id -u)" = 0 ] || skip "it needs root"
for tool in podman crun mmdebstrap nix-instantiate ip python3 unshare; do
    command -v "$tool" >/dev/null || skip "$tool is missing"
done
for file in "$bin"/{mesh-head,mesh-worker,mesh-shim,hydramesh}; do
    [ -x "$file" ] || skip "$file is missing: run 'make build'"
done
for file in "$ort" "$cache/models/$model.gguf"; do
    [ -f "$file" ] || skip "$file is missing: run 'make fetch'"
done

# In a mount namespace of its own, so that no mount outlives the test. The cgroup2 mount of a host with both cgroup versions
# confuses crun: it is not taken along.
if [ -z "${HYDRAMESH_IMAGES_UNSHARED:-}" ]; then
    unshare -m --propagation private true 2>/dev/null || skip "mount namespaces are not allowed here"
    HYDRAMESH_IMAGES_UNSHARED=1 exec unshare -m --propagation private bash "$root/scripts/test_images.sh" "$@"
fi
if grep -q ' cgroup ' /proc/self/mounts; then
    awk '$3 == "cgroup2" { print $2 }' /proc/self/mounts | while read -r mount; do umount -l "$mount"; done
fi

work=$(mktemp -d /var/tmp/hydramesh-images.XXXXXX)
export CONTAINERS_CONF=$work/containers.conf
cat >"$CONTAINERS_CONF" <<'END'
[containers]
default_ulimits = ["nofile=1024:1024", "nproc=1024:1024"]
[engine]
cgroup_manager = "cgroupfs"
events_logger = "file"
runtime = "crun"
END
pod() { podman --root "$work/storage" --runroot "$work/run" --storage-driver overlay "$@"; }

# The containers' networks: two network namespaces with a cable between them, reachable from here through `ip netns exec`.
suffix=$$
left=hm-head-$suffix
right=hm-worker-$suffix
cleanup() {
    pod rm --all --force --time 0 >/dev/null 2>&1 || true
    pod volume rm --all --force >/dev/null 2>&1 || true
    ip netns del "$left" 2>/dev/null || true
    ip netns del "$right" 2>/dev/null || true
    pod system reset --force >/dev/null 2>&1 || true
    rm -rf "$work"
}
trap cleanup EXIT
ip netns add "$left" 2>/dev/null || skip "network namespaces are not allowed here"
ip netns add "$right"
ip link add hmv0 netns "$left" type veth peer name hmv0 netns "$right"
ip -n "$left" addr add 10.89.77.1/24 dev hmv0
ip -n "$right" addr add 10.89.77.2/24 dev hmv0
for namespace in "$left" "$right"; do
    ip -n "$namespace" link set lo up
    ip -n "$namespace" link set hmv0 up
done

# The base: Debian with tini, CA certificates and what images/default.nix adds to the root. Kept in the cache.
base=$cache/images/base-1.tar
if [ ! -f "$base" ]; then
    say "making a Debian base (once)"
    sources=()
    for file in /etc/apt/sources.list /etc/apt/sources.list.d/*.sources /etc/apt/sources.list.d/*.list; do
        [ -f "$file" ] && sources+=("$file")
    done
    [ ${#sources[@]} -gt 0 ] || skip "this machine has no apt sources for a Debian base"
    mkdir -p "$cache/images"
    # shellcheck disable=SC2016  # mmdebstrap's own shell knows $1
    mmdebstrap --quiet --variant=minbase --include=tini,ca-certificates \
        --customize-hook='echo "hydramesh:x:10001:10001:HydraMesh:/var/lib/hydramesh:/sbin/nologin" >>"$1/etc/passwd"' \
        --customize-hook='echo "hydramesh:x:10001:" >>"$1/etc/group"' \
        --customize-hook='mkdir -p "$1/var/lib/hydramesh/models"' \
        --customize-hook='chown -R 10001:10001 "$1/var/lib/hydramesh" && chmod 0750 "$1/var/lib/hydramesh"' \
        --customize-hook='rm -rf "$1"/var/lib/apt/lists/* "$1"/var/cache/apt/*' \
        "$(sed -n 's/^VERSION_CODENAME=//p' /etc/os-release)" "$work/base.tar" "${sources[@]}" >"$work/base.log" 2>&1 || {
        tail -5 "$work/base.log" >&2
        skip "mmdebstrap cannot make a Debian base from this machine's apt sources"
    }
    mv "$work/base.tar" "$base"
fi
pod import "$base" localhost/hydramesh-test-base >/dev/null 2>&1 || fail "podman cannot import the base"

build() { # build <role>: the image, from the configuration that images/config.nix gives
    local folder=$work/$1
    mkdir "$folder"
    cp "$bin/mesh-$1" "$folder/"
    [ "$1" != worker ] || cp "$ort" "$folder/libonnxruntime.so"
    nix-instantiate --eval --strict --json "$root/nix/tests/image-config.nix" --argstr role "$1" \
        >"$folder/config.json" 2>"$folder/nix.log" || {
        cat "$folder/nix.log" >&2
        fail "the configuration of mesh-$1 does not evaluate"
    }
    python3 - "$1" "$folder" <<'END'
import json, pathlib, sys

role, folder = sys.argv[1], pathlib.Path(sys.argv[2])
config = json.loads((folder / "config.json").read_text())
health = config.pop("Healthcheck")
lines = ["FROM localhost/hydramesh-test-base", f"COPY mesh-{role} /usr/bin/mesh-{role}"]
if role == "worker":
    lines.append("COPY libonnxruntime.so /opt/onnxruntime/libonnxruntime.so")
for line in config.pop("Env"):
    name, value = line.split("=", 1)
    lines.append(f"ENV {name}={json.dumps(value)}")
for name, value in config.pop("Labels").items():
    lines.append(f"LABEL {json.dumps(name)}={json.dumps(value)}")
for port in config.pop("ExposedPorts"):
    lines.append(f"EXPOSE {port}")
lines.append(f"VOLUME {json.dumps(list(config.pop('Volumes')))}")
lines.append(f"WORKDIR {config.pop('WorkingDir')}")
lines.append(f"USER {config.pop('User')}")
lines.append(f"STOPSIGNAL {config.pop('StopSignal')}")
lines.append(f"ENTRYPOINT {json.dumps(config.pop('Entrypoint'))}")
kind, *command = health.pop("Test")
assert kind == "CMD", "a health check with a shell"
seconds = lambda name: f"{health.pop(name) // 10**9}s"
lines.append(
    f"HEALTHCHECK --interval={seconds('Interval')} --timeout={seconds('Timeout')} "
    f"--start-period={seconds('StartPeriod')} --retries={health.pop('Retries')} CMD {json.dumps(command)}"
)
assert not config and not health, f"not carried over: {config} {health}"
(folder / "Containerfile").write_text("\n".join(lines) + "\n")
END
    pod build --quiet --format docker --network host --tag "localhost/mesh-$1" "$folder" >/dev/null 2>"$folder/build.log" || {
        cat "$folder/build.log" >&2
        fail "podman cannot build mesh-$1"
    }
}

start() { # start <name> <network> <podman options...>
    local name=$1 network=$2
    shift 2
    pod run --detach --name "$name" --network "$network" --no-hosts \
        --read-only --read-only-tmpfs=false --tmpfs /tmp --cap-drop ALL --security-opt no-new-privileges \
        --volume "$name:/var/lib/hydramesh" "$@" "localhost/mesh-$name" >/dev/null 2>"$work/$name.log" || {
        cat "$work/$name.log" >&2
        fail "$name does not start"
    }
}

healthy() { # healthy <name>: within 30 s, by the image's own health check
    local began=$SECONDS
    until pod healthcheck run "$1" >/dev/null 2>&1; do
        [ "$(pod inspect --format '{{.State.Running}}' "$1")" = true ] || fail "$1 has ended"
        [ $((SECONDS - began)) -lt 30 ] || fail "$1 is not healthy within 30 s"
        sleep 0.5
    done
    say "$1 is healthy after $((SECONDS - began)) s"
}

confined() { # confined <name>: every process in it, judged by the kernel's own words
    local first pids pid
    first=$(pod inspect --format '{{.State.Pid}}' "$1")
    pids="$first $(cat "/proc/$first/task/$first/children")"
    [ "$(wc -w <<<"$pids")" -ge 2 ] || fail "$1 does not run below tini"
    for pid in $pids; do
        awk -v id="$id" '
            $1 == "Uid:" || $1 == "Gid:" { for (i = 2; i <= 5; i++) if ($i != id) exit 1 }
            $1 ~ /^Cap(Inh|Prm|Eff|Bnd|Amb):$/ && $2 !~ /^0+$/ { exit 1 }
            $1 == "NoNewPrivs:" && $2 != 1 { exit 1 }
        ' "/proc/$pid/status" || fail "$1: process $pid has another user, capabilities or new privileges"
    done
    awk '$5 == "/" && $6 !~ /(^|,)ro(,|$)/ { exit 1 }' "/proc/$first/mountinfo" || fail "$1: the root is writable"
    if pod exec "$1" /usr/bin/touch /written 2>/dev/null; then
        fail "$1 can write to its root"
    fi
    [ -z "$(pod diff "$1" | grep -vE '^[AC] /(etc|run|dev|proc|sys|tmp|var|var/lib|var/lib/hydramesh)(/|$)' || true)" ] ||
        fail "$1 has changed its root: $(pod diff "$1")"
}

for role in head shim worker; do
    build "$role"
done
say "three images are built"

secrets=$work/secrets
mkdir -m 0755 "$secrets"
key=$(head -c 24 /dev/urandom | base64 | tr -d '=+/')
echo "$key" >"$secrets/api-keys"
chown "$id:$id" "$secrets/api-keys"
chmod 0400 "$secrets/api-keys"

start head "ns:/run/netns/$left" \
    --env HYDRAMESH_HEAD__HTTP__LISTEN=0.0.0.0:8080 \
    --env HYDRAMESH_HEAD__HTTP__API_KEYS_FILE=/run/secrets/api-keys \
    --volume "$secrets/api-keys:/run/secrets/api-keys:ro"
healthy head
confined head

start shim container:head --env HYDRAMESH_SHIM__ADMIT=verified
healthy shim
confined shim

pod exec head mesh-head token create >"$secrets/join-token" 2>"$work/token.log" || {
    cat "$work/token.log" >&2
    fail "the head makes no token"
}
chown "$id:$id" "$secrets/join-token"
chmod 0400 "$secrets/join-token"
start worker "ns:/run/netns/$right" \
    --env HYDRAMESH_WORKER__HEAD=10.89.77.1:7780 \
    --env HYDRAMESH_WORKER__JOIN_TOKEN_FILE=/run/secrets/join-token \
    --env "HYDRAMESH_WORKER__MODELS=[\"$model\"]" \
    --volume "$secrets/join-token:/run/secrets/join-token:ro" \
    --volume "$cache/models:/var/lib/hydramesh/models:ro"
healthy worker
confined worker

# From the worker's side of the cable, so that the head's ports are reached from another machine.
there() { ip netns exec "$right" "$@"; }
cat >"$work/ask.py" <<'END'
import json, sys, urllib.request

url, model, key = sys.argv[1:]
body = {"model": model, "max_tokens": 24, "messages": [{"role": "user", "content": "Name three rivers."}]}
request = urllib.request.Request(
    f"{url}/v1/chat/completions",
    json.dumps(body).encode(),
    {"content-type": "application/json", **({"authorization": f"Bearer {key}"} if key else {})},
)
with urllib.request.urlopen(request, timeout=60) as answer:
    print(json.load(answer)["choices"][0]["message"]["content"])
END
began=$SECONDS
until answer=$(there python3 "$work/ask.py" http://10.89.77.1:8080 "$model" "$key" 2>"$work/ask.log") && [ -n "$answer" ]; do
    [ $((SECONDS - began)) -lt 30 ] || {
        cat "$work/ask.log" >&2
        fail "no answer through the head"
    }
    sleep 1
done
say "over HTTP: ${answer//$'\n'/ }"
if ! answer=$(there timeout 60 "$bin/hydramesh" ask --to 10.89.77.1:9999 --max-tokens 24 "Name three rivers." 2>"$work/ask.log") ||
    [ -z "$answer" ]; then
    cat "$work/ask.log" >&2
    fail "no answer through the shim"
fi
say "over DCF/UDP through the shim: ${answer//$'\n'/ }"

if there python3 "$work/ask.py" http://10.89.77.1:8080 "$model" "" >/dev/null 2>&1; then
    fail "the head's API is open without a key"
fi

for name in worker shim head; do
    pod stop --time 40 "$name" >/dev/null 2>&1 || fail "$name does not stop"
    status=$(pod inspect --format '{{.State.ExitCode}}' "$name")
    [ "$status" = 0 ] || fail "$name ends with $status instead of 0 after SIGTERM"
done
say "passed: 3 images, read-only, no capabilities, uid $id, healthy, one answer over HTTP and one through the shim"
