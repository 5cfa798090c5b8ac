#!/usr/bin/env bash
# The floor that apply is held against: what somebody would write by hand for the same two machines.
# It launches them in parallel from a finished image, hands on the CAs, installs faster-whisper in one and
# slim Open WebUI in the other, starts the latter and waits for its health. No checks, no second run.
#
#   bench/floor.sh IMAGE      (makes and removes the project bench-floor)
set -eu
image=$1
root=$(cd "$(dirname "$0")/.." && pwd)
project=bench-floor

incus_do() { incus --project "$project" "$@" </dev/null; }

remove() {
  incus_do delete --force floor-speech floor-webui >/dev/null 2>&1 || true
  incus project delete "$project" >/dev/null 2>&1 || true
  incus network delete net-floor >/dev/null 2>&1 || true
}
remove
trap remove EXIT
incus network create net-floor ipv4.address=10.230.0.254/24 ipv4.nat=true ipv6.address=none >/dev/null
incus project create "$project" -c features.images=false -c features.networks=false >/dev/null

machine() { # name, lock, cache inside
  incus_do launch "$image" "$1" --storage default --network net-floor >/dev/null
  incus_do exec "$1" -- mkdir -p /usr/local/share/ca-certificates
  for certificate in /usr/local/share/ca-certificates/*.crt; do
    [ ! -e "$certificate" ] || incus_do file push --quiet "$certificate" "$1/usr/local/share/ca-certificates/"
  done
  # Only after the boot: systemd clears /tmp on its way.
  incus_do exec "$1" -- timeout 60 sh -c '
    until ip -4 -o address show dev eth0 scope global | grep -q inet; do sleep 0.1; done
    update-ca-certificates >/dev/null'
  incus_do file push --quiet "$2" "$1/root/requirements.lock"
  incus_do file push --quiet "$root/roles/uv/files/requirements.lock" "$1/root/uv.lock"
  incus_do exec "$1" --env SSL_CERT_FILE=/etc/ssl/certs/ca-certificates.crt \
    --env PIP_CERT=/etc/ssl/certs/ca-certificates.crt --env UV_SYSTEM_CERTS=1 -- sh -ec '
    python3 -m venv /opt/uv && /opt/uv/bin/pip install -q --require-hashes -r /root/uv.lock
    /opt/uv/bin/uv venv -q /opt/venv
    /opt/uv/bin/uv pip sync -q -p /opt/venv --require-hashes /root/requirements.lock'
}

speech() {
  machine floor-speech "$root/gateway/requirements.lock"
  echo "speech: $(($(date +%s) - start)) s"
}

webui() {
  machine floor-webui "$root/roles/open_webui/files/requirements-slim.lock"
  incus_do exec floor-webui -- systemd-run --quiet --unit=open-webui \
    --setenv=DATA_DIR=/root/data --setenv=RAG_EMBEDDING_ENGINE=ollama --setenv=OFFLINE_MODE=true \
    --setenv=WEBUI_SECRET_KEY=bench --setenv=ENABLE_OPENAI_API=false \
    /opt/venv/bin/open-webui serve --host 127.0.0.1 --port 3000
  incus_do exec floor-webui -- timeout 180 sh -c \
    'until python3 -c "import urllib.request as r; r.urlopen(\"http://127.0.0.1:3000/health\")" 2>/dev/null
     do sleep 0.5; done'
  echo "webui: $(($(date +%s) - start)) s"
}

start=$(date +%s)
speech & first=$!
webui & second=$!
wait "$first"
wait "$second"
