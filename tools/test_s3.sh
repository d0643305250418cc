#!/usr/bin/env bash
# The tests of object storage against a real server: Debian's radosgw over one memory store, on loopback, ended at the end.
# Run by `make test-s3` as root (it installs packages where they are missing, and Ceph's daemons want it).
set -euo pipefail
cd "$(dirname "$0")/.."

packages=(radosgw ceph-mon ceph-osd ceph-mgr)
command -v radosgw ceph-mon ceph-osd ceph-mgr ceph >/dev/null ||
  { apt-get -qq update && DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends "${packages[@]}" >/dev/null; }

home=$(mktemp -d /tmp/cdr-radosgw-XXXXXX)
pids=()
finish() {
  for ((i = ${#pids[@]} - 1; i >= 0; i--)); do kill "${pids[i]}" 2>/dev/null || true; done
  for _ in $(seq 50); do
    alive=0
    for pid in "${pids[@]}"; do kill -0 "$pid" 2>/dev/null && alive=1; done
    ((alive)) || break
    sleep 0.1
  done
  for pid in "${pids[@]}"; do kill -9 "$pid" 2>/dev/null || true; done
  rm -rf "$home"
}
trap finish EXIT
fail() { echo "test_s3: $*" >&2; tail -n 5 "$home"/*.log >&2 || true; exit 1; }
start() { # NAME COMMAND…: in the background, with a log of its own
  local name=$1
  shift
  "$@" >"$home/$name.log" 2>&1 &
  pids+=($!)
}
until_true() { # SECONDS COMMAND…
  for _ in $(seq $(($1 * 5))); do "${@:2}" >/dev/null 2>&1 && return 0; sleep 0.2; done
  return 1
}
free_port() { python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'; }

mon_port=$(free_port) s3_port=$(free_port) fsid=$(cat /proc/sys/kernel/random/uuid)
mkdir -p "$home"/{mon,mgr,osd,run}
export CEPH_CONF=$home/ceph.conf
cat >"$CEPH_CONF" <<END
[global]
fsid = $fsid
mon initial members = a
mon host = [v2:127.0.0.1:$mon_port/0]
public addr = 127.0.0.1
cluster addr = 127.0.0.1
auth cluster required = cephx
auth service required = cephx
auth client required = cephx
keyring = $home/keyring
run dir = $home/run
admin socket = $home/run/\$name.asok
log file =
log to stderr = true
mon cluster log file = /dev/null
mon data = $home/mon
mgr data = $home/mgr
osd data = $home/osd
osd objectstore = memstore
memstore device bytes = 2147483648
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 8
osd crush chooseleaf type = 0
osd class update on start = false
mon allow pool size one = true
mon data avail crit = 1
mon data avail warn = 2
mon osd full ratio = 0.99
mgr initial modules =
ms bind ipv6 = false
rgw frontends = beast endpoint=127.0.0.1:$s3_port
rgw data = $home/rgw
END

ceph-authtool --create-keyring "$home/keyring" --gen-key -n mon. --cap mon 'allow *' >/dev/null
ceph-authtool "$home/keyring" --gen-key -n client.admin --cap mon 'allow *' --cap osd 'allow *' --cap mgr 'allow *' >/dev/null
ceph-authtool "$home/keyring" --gen-key -n mgr.a --cap mon 'allow profile mgr' --cap osd 'allow *' >/dev/null
ceph-authtool "$home/keyring" --gen-key -n osd.0 --cap mon 'allow profile osd' --cap mgr 'allow profile osd' --cap osd 'allow *' >/dev/null
ceph-authtool "$home/keyring" --gen-key -n client.rgw --cap mon 'allow rw' --cap osd 'allow rwx' >/dev/null
monmaptool --create --addv a "[v2:127.0.0.1:$mon_port]" --fsid "$fsid" "$home/monmap" >/dev/null 2>&1
began=$(date +%s.%N)
ceph-mon --mkfs -i a --monmap "$home/monmap" --keyring "$home/keyring" >"$home/mkfs.log" 2>&1 || fail "no monitor"
start mon ceph-mon -f -i a
until_true 30 timeout 5 ceph -s || fail "the monitor does not answer"
ceph auth import -i "$home/keyring" >/dev/null 2>&1
start mgr ceph-mgr -f -i a
osd=$(cat /proc/sys/kernel/random/uuid)
ceph osd new "$osd" 0 >/dev/null 2>&1
ceph-osd --mkfs -i 0 --osd-uuid "$osd" >"$home/osd-mkfs.log" 2>&1 || fail "no store"
start osd ceph-osd -f -i 0
until_true 30 sh -c 'ceph osd stat | grep -q "1 up"' || fail "the store is not up"
start rgw radosgw -f -n client.rgw
until_true 60 curl -sf -o /dev/null "http://127.0.0.1:$s3_port/" || fail "radosgw does not answer"
keys=$(radosgw-admin user create --uid=cdr --display-name=cdr 2>/dev/null)
key() { python3 -c "import json, sys; print(json.loads(sys.argv[1])['keys'][0]['$1'])" "$keys"; }
AWS_ACCESS_KEY_ID=$(key access_key)
AWS_SECRET_ACCESS_KEY=$(key secret_key)
export AWS_ACCESS_KEY_ID AWS_SECRET_ACCESS_KEY
echo "radosgw on 127.0.0.1:$s3_port after $(python3 -c "import time; print(round(time.time() - $began, 1))") s"
unset CEPH_CONF
CDR_TEST_S3=http://127.0.0.1:$s3_port "${PYTHON:-.venv/bin/python}" -m pytest -q \
    tests/test_object_store.py tests/test_object_store_jobs.py tests/test_dataset_replicas.py "$@"
