#!/bin/bash
# Runs inside the guest as the last unit of its boot: starts the units that the module generates, breaks them, looks at what they
# wrote. Says what it saw on standard output; the first line of /result is PASS or the step that failed.
set -uo pipefail
export PATH=/opt/hydramesh/bin:$PATH

step() { printf '== %s\n' "$*" && now=$*; }
fail() {
    printf 'FAILED at: %s: %s\n' "$now" "$*"
    printf 'FAILED at: %s: %s\n' "$now" "$*" >/result
    for role in head worker shim; do
        systemctl status --no-pager --lines=0 "hydramesh-$role" 2>&1
        journalctl --no-pager --lines=30 --output=cat --unit="hydramesh-$role" 2>&1
    done
    exit 1
}
property() { systemctl show --property="$2" --value "hydramesh-$1"; }
wait_for() { # wait_for SECONDS WHAT COMMAND...
    local deadline=$((SECONDS + $1)) what=$2
    shift 2
    until "$@" >/dev/null 2>&1; do
        ((SECONDS < deadline)) || fail "$what did not come to pass in time"
        sleep 0.2
    done
}
restarted() { [ "$(property "$1" NRestarts)" -gt "$2" ] && systemctl is-active --quiet "hydramesh-$1"; }
answers() {
    local answer
    answer=$(hydramesh ask --to 127.0.0.1:9999 --timeout "${patience}s" --temperature 0 --max-tokens 8 "What is the capital of France?") && [ -n "$answer" ]
}

# Time limit for every step here, in seconds: this machine's own first start of a worker, several times over.
# A machine without KVM can need minutes for a step that takes a second elsewhere, so a fixed number is wrong
# on one of them.
patience=60

step "the head reaches READY"
touch /before
systemctl start hydramesh-head || fail "systemctl start"

step "a join token is made and read from a file"

(umask 077 && hydramesh token create --state-dir /var/lib/hydramesh/head >/etc/hydramesh/join-token) || fail "hydramesh token create"

step "worker and shim reach READY"
started=$SECONDS
systemctl start hydramesh-worker hydramesh-shim || fail "systemctl start"
patience=$((60 + 5 * (SECONDS - started)))
printf 'the first start took %s s; from here on, everything gets %s s\n' "$((SECONDS - started))" "$patience"

step "a prompt sent through the shim is answered"
started=$SECONDS
wait_for "$((5 * patience))" "an answer" answers
# A rerun waits for a start and for an answer.
patience=$((patience + 5 * (SECONDS - started)))
hydramesh status

step "the worker measures itself and listens for others"
wait_for "$patience" "the ring's port" sh -c 'ss -Hlun "sport = :7781" | grep -q .'
journalctl --no-pager --output=cat --unit=hydramesh-worker | grep "offered in parts" || fail "no offer"
[ -s /var/lib/hydramesh/worker/profile.json ] || fail "its measurements are not kept"

step "every service reloads"
for role in head worker shim; do
    pid=$(property "$role" MainPID)
    systemctl reload "hydramesh-$role" || fail "systemctl reload of the $role"
    wait_for 20 "the $role's word about it" sh -c "journalctl --no-pager --output=cat --unit=hydramesh-$role | grep -q '^reloaded: '"
    wait_for 20 "the end of its reload" systemctl is-active --quiet "hydramesh-$role"
    [ "$(property "$role" MainPID)" = "$pid" ] || fail "the $role was restarted"
done

step "a killed worker comes back by itself"
before=$(property worker NRestarts)
kill -KILL "$(property worker MainPID)"
wait_for "$patience" "a restart of the worker" restarted worker "$before"
wait_for "$patience" "an answer" answers

step "the watchdog restarts a stopped head"
before=$(property head NRestarts)
kill -STOP "$(property head MainPID)"
# WatchdogSec=30 comes on top.
wait_for "$((60 + patience))" "a restart of the head" restarted head "$before"
wait_for "$patience" "an answer" answers

step "what the kernel was told"
printf 'worker OOMScoreAdjust: %s\n' "$(cat "/proc/$(property worker MainPID)/oom_score_adj")"
if [ "${VM_KIND:-}" = qemu ]; then
    [ "$(cat "/proc/$(property worker MainPID)/oom_score_adj")" = -500 ] || fail "OOMScoreAdjust of the worker"
    [ "$(property worker MemoryMax)" != infinity ] || fail "MemoryMax of the worker"
fi
for role in head worker shim; do
    pid=$(property "$role" MainPID)
    grep -q '^NoNewPrivs:.1$' "/proc/$pid/status" || fail "NoNewPrivileges of $role"
    grep -q '^Seccomp:.2$' "/proc/$pid/status" || fail "SystemCallFilter of $role"
    grep -q '^CapEff:.0*$' "/proc/$pid/status" || fail "CapabilityBoundingSet of $role"
    [ "$(stat -c %u "/proc/$pid")" != 0 ] || fail "DynamicUser of $role"
done

step "the state directory is all that was written"
written=$(find / -xdev -newer /before -type f ! -path '/proc/*' ! -path '/sys/*' ! -path '/run/*' ! -path '/var/lib/private/hydramesh/*' \
    ! -path '/var/log/*' ! -path '/etc/hydramesh/*' ! -path /result ! -path '/var/lib/systemd/*' ! -path '/tmp/guest.log')
[ -z "$written" ] || fail "$written"

step "all of them drain and end well"
systemctl stop hydramesh-shim hydramesh-worker hydramesh-head || fail "systemctl stop"
for role in head worker shim; do
    [ "$(property "$role" Result)" = success ] || fail "$role ended with $(property "$role" Result)"
done
systemctl --failed --no-legend --no-pager
echo PASS >/result
