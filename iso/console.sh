# hydramesh-console: what this machine is, its address, what it waits for, and a few keys to help it. On the first virtual console.
#
# It gives no shell. What is typed goes into a file that root alone can read, and from there to `hydramesh boot-config`, so that
# a token is in no list of processes.

typed=/run/hydramesh-typed
units=(
  hydramesh-head.service
  hydramesh-shim.service
  hydramesh-worker-cpu.service
  hydramesh-worker-nvidia.service
  hydramesh-worker-rocm.service
)

addresses() {
  ip -brief address show scope global up | awk '{ for (i = 3; i <= NF; i++) if (sub("/.*", "", $i)) print $i }'
}

role() {
  local file
  for file in /run/hydramesh/role-*; do
    [ -e "$file" ] && basename "$file" | cut -d - -f 2 && return
  done
  echo none
}

# One line for each service that runs or should.
state() {
  systemctl show --property Id,ActiveState,SubState,StatusText "${units[@]}" | awk -F= '
    { value[$1] = substr($0, length($1) + 2) }
    $0 == "" { tell() }
    END { tell() }
    function tell() {
      if (value["ActiveState"] == "active")
        print value["Id"] " runs" (value["StatusText"] == "" ? "" : ": " value["StatusText"])
      else if (value["ActiveState"] ~ /activating|failed/)
        print value["Id"] " does not run yet (" value["SubState"] "). Its log: key g."
      delete value
    }'
}

screen() {
  local found
  printf '\033[1mHydraMesh\033[0m on %s\n\n' "$(uname -n)"
  cat /run/hydramesh/summary 2>/dev/null || echo "hydramesh-boot has not finished, or failed. Its log: key g."
  echo
  found=$(addresses)
  if [ -z "$found" ]; then
    echo "No network address yet; a cable is the simplest."
  else
    echo "Address: ${found//$'\n'/, }"
  fi
  if [ "$(role)" = head ] && [ -n "$found" ]; then
    echo "Workers join with hydramesh.head=${found%%$'\n'*}:7780 and a token; key t makes one."
  fi
  state
  echo
  echo "  j join a mesh    h be a head    t token (on a head)    l look again    g log"
  echo "  f forget what was typed         r restart              o power off"
}

show() {
  local text
  text=$(screen)
  printf '\033[H\033[2J%s\n' "$text"
}

# What the services were told, as one text that changes with it.
told() {
  (cd /run/hydramesh && sha256sum role-* service.env join-token) 2>/dev/null || true
}

# Decides anew and starts what follows. A unit whose role it is not does not start, by its condition. A service that was told
# nothing new goes on with its work.
apply() {
  local before
  before=$(told)
  systemctl restart hydramesh-boot.service || true
  if [ "$(told)" != "$before" ]; then
    systemctl stop "${units[@]}"
  fi
  systemctl start --no-block sshd.service "${units[@]}"
}

# Keeps key=value lines.
keep() {
  (umask 077 && cat >"$typed")
}

join() {
  local head token
  read -r -p "The head's address, HOST:7780 (empty: as it was told elsewhere): " head || return 0
  read -r -s -p "The join token; it is not shown (empty: as it was told elsewhere): " token || return 0
  echo
  {
    echo role=worker
    [ -z "$head" ] || printf 'head=%s\n' "$head"
    [ -z "$token" ] || printf 'token=%s\n' "$token"
  } | keep
  apply
}

token() {
  if [ "$(role)" = head ]; then
    echo "For one worker, within a day:"
    hydramesh token create --state-dir /var/lib/hydramesh/head || true
  else
    echo "Only a head makes tokens; key h makes this machine one."
  fi
  pause
}

pause() {
  read -r -p "Enter goes back. " _ || true
}

sure() {
  local answer
  read -r -p "$1 Type yes: " answer && [ "$answer" = yes ]
}

while true; do
  show
  # Shown anew now and then, since addresses and services come and go.
  read -r -n 1 -t 15 -p "> " key || key=
  echo
  case $key in
    j) join ;;
    h)
      if [ "$(role)" = none ] || sure "It is a $(role) now. Make it a head?"; then
        echo role=head | keep
        apply
      fi
      ;;
    t) token ;;
    l) apply ;;
    f) rm -f "$typed" && apply ;;
    g)
      journalctl --boot --no-pager --lines 40 --unit hydramesh-boot.service "${units[@]/#/--unit=}"
      pause
      ;;
    r) if sure "Restart this machine?"; then systemctl reboot; fi ;;
    o) if sure "Power this machine off?"; then systemctl poweroff; fi ;;
  esac
done
