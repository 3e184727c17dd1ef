# hydramesh-console: what this machine is, its address, what it waits for, and a few keys to help it. On the first virtual console.
#
# It gives no shell. What is typed goes into a file that root alone can read, and from there to `hydramesh boot-config`, so that
# a token is in no list of processes.

typed=/run/hydramesh-typed
partition=/run/hydramesh-partition
read -r -a units <<<"$HYDRAMESH_UNITS"

addresses() {
  ip -brief address show scope global up | awk '{ for (i = 3; i <= NF; i++) if (sub("/.*", "", $i)) print $i }'
}

# As it stands before a port.
host() {
  case $1 in
    *:*) echo "[$1]" ;;
    *) echo "$1" ;;
  esac
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
    echo "Workers join with hydramesh.head=$(host "${found%%$'\n'*}"):7780 and a token; key t makes one."
  fi
  state
  echo
  echo "  j join a mesh   c join by a code   k keyboard layout   n network, Wi-Fi"
  echo "  h be a head; there:   t show a token   w token to a stick   p show a code"
  echo "  l look again   g log   f forget what was typed   r restart   o power off"
}

# Clears the scrollback, too: a token may be in it.
clear_screen() {
  printf '\033[H\033[2J\033[3J'
}

show() {
  local text
  text=$(screen)
  clear_screen
  printf '%s\n' "$text"
}

apply() {
  clear_screen
  echo "One moment..."
  hydramesh-apply || echo "It did not work; the log (key g) says more."
}

# Keeps key=value lines.
keep() {
  (umask 077 && cat >"$typed")
}

# True if a text has the form of a token; only the head can tell later if it is known.
is_token() {
  [[ $1 =~ ^hydra1\.[A-Za-z0-9_-]{80}$ ]]
}

join() {
  local head token
  read -r -p "The head's address, HOST:7780 (empty: as it was told elsewhere): " head || return 0
  echo "The join token: 87 characters, shown while you type. Key k changes the keyboard layout first."
  while true; do
    read -r -p "Token (empty: as it was told elsewhere): " token || return 0
    token=${token//[[:space:]]/}
    if [ -z "$token" ] || is_token "$token"; then
      break
    fi
    echo "This has ${#token} characters. A token has 87, begins with \"hydra1.\", and holds letters, digits, - and _. Again, please."
  done
  {
    echo role=worker
    [ -z "$head" ] || printf 'head=%s\n' "$head"
    [ -z "$token" ] || printf 'token=%s\n' "$token"
  } | keep
  apply
}

new_token() {
  hydramesh token create --state-dir /var/lib/hydramesh/head
}

is_head() {
  [ "$(role)" = head ] && return
  echo "Only a head makes tokens; key h makes this machine one."
  return 1
}

token() {
  if is_head; then
    echo "For one worker, within a day:"
    new_token || true
  fi
  pause
}

# A token for whoever types the code, in the LAN.
offer() {
  local pid
  if is_head; then
    hydramesh token offer --state-dir /var/lib/hydramesh/head </dev/null 2>&1 &
    pid=$!
    pause
    kill "$pid" 2>/dev/null || true
    wait "$pid" || true
  else
    pause
  fi
}

# The other side of it.
join_by_code() {
  local code told
  read -r -p "The code that the head shows (there: key p, or hydramesh token offer): " code || return 0
  [ -n "$code" ] || return 0
  echo "Looking for the head..."
  if told=$(printf '%s\n' "$code" | hydramesh token fetch 2>/dev/tty); then
    printf 'role=worker\n%s\n' "$told" | keep
    apply
  else
    pause
  fi
}

# A token and the head's address onto the partition HYDRAMESH, so that nobody has to type them at the worker.
stick() {
  local address made
  if is_head; then
    if ! mountpoint --quiet "$partition"; then
      echo "No partition labelled HYDRAMESH is here. Attach a stick that has one; docs/how-to/live-image.md says how to make it."
    elif made=$(new_token); then
      address=$(addresses | head -n 1)
      [ -z "$address" ] || address=$(host "$address")
      if mount -o remount,rw,nosuid,nodev,noexec "$partition" && put "$address" "$made"; then
        echo "Done. Plug the stick into one machine that boots from this image: it joins by itself."
      else
        echo "The stick cannot be written to; is it write-protected, or full?"
      fi
      mount -o remount,ro,nosuid,nodev,noexec "$partition" || echo "The stick stays writable; pull it only when the machine is off."
    else
      echo "The head made no token; its log: key g."
    fi
  fi
  pause
}

put() {
  printf '%s\n' "$2" >"$partition/join-token" || return 1
  # Somebody's own settings are left as they are.
  if [ ! -e "$partition/hydramesh.toml" ] && [ -n "$1" ]; then
    printf 'head = "%s:7780"\n' "$1" >"$partition/hydramesh.toml" || return 1
  fi
  sync --file-system "$partition"
}

keymap() {
  local name
  read -r -p "The keyboard layout, such as de, fr, uk, us (empty: as it is): " name || return 0
  [ -n "$name" ] || return 0
  if [[ ! $name =~ ^[A-Za-z0-9][A-Za-z0-9._@+-]*$ ]] || ! loadkeys --quiet --unicode "$name"; then
    echo "There is no keyboard layout $name. Names are those of loadkeys: de, de-latin1, fr, it, es, uk, us, dvorak."
    pause
  fi
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
    w) stick ;;
    p) offer ;;
    c) join_by_code ;;
    k) keymap ;;
    n) nmtui || pause ;;
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
