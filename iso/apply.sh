# hydramesh-apply: decides anew what this machine does, and starts what follows.
#
# hydramesh-console runs it when somebody types, hydramesh-plugged.service when a partition of ours is attached. A service that was
# told nothing new goes on with its work.

read -r -a units <<<"$HYDRAMESH_UNITS"
applied=/run/hydramesh-applied
state_label=/dev/disk/by-label/HYDRASTATE
state=/var/lib/private/hydramesh

exec 9>/run/hydramesh-apply.lock
flock 9

# The services' files and the place of their state, as one text that changes with them.
told() {
  (cd /run/hydramesh && sha256sum role-* service.env join-token) 2>/dev/null || true
  findmnt --noheadings --output SOURCE --mountpoint "$state" || true
}

# Kept in a file, since a second stick may end this run half-way and start the next.
[ -e "$applied" ] || told >"$applied"
# A service keeps the folder that it started in: hydramesh-boot mounts HYDRASTATE only when none runs.
if [ -e "$state_label" ] && ! mountpoint --quiet "$state"; then
  systemctl stop "${units[@]}" || true
fi
systemctl restart hydramesh-boot.service || true
if [ "$(told)" != "$(cat "$applied")" ]; then
  systemctl stop "${units[@]}" || true
  told >"$applied"
fi
# Each by itself: of several, none is started where one does not exist. A unit whose role it is not does not start, by its
# condition.
for unit in sshd.service "${units[@]}"; do
  systemctl start --no-block "$unit" || true
done
