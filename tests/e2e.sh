#!/usr/bin/env bash
# Molecule and the end-to-end tests, in an Incus daemon of their own that is gone afterwards. The Incus of this
# machine, if there is one, is neither needed nor touched; only packages are installed when they are missing.
#
#   tests/e2e.sh [pytest arguments]     (with arguments: only pytest, on a daemon of its own)
#   tests/e2e.sh gpu [pytest arguments] (the same where simulated NVIDIA cards are seen; without: tests/gpu)
set -eu
cd "$(dirname "$0")/.."
bin=.venv/bin
[ -t 1 ] || export NO_COLOR=1
skipped=()

finish() {
  local code=$?
  if [ ${#skipped[@]} -gt 0 ]; then
    printf '\nSkipped on this machine:\n'
    printf '  %s\n' "${skipped[@]}"
  fi
  exit "$code"
}
trap finish EXIT

if [ "$(id -u)" != 0 ]; then
  skipped+=("molecule and tests/e2e: a daemon of their own needs root")
  exit 0
fi
if ! command -v incus >/dev/null || ! command -v mmdebstrap >/dev/null; then
  $bin/ansible-playbook tests/support/packages.yml
fi
if ! reason=$($bin/python tests/support/incusd.py probe); then
  skipped+=("molecule and tests/e2e: $reason")
  exit 0
fi
if ! command -v chromium >/dev/null || ! command -v chromedriver >/dev/null; then
  { apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium chromium-driver; } >/dev/null ||
    skipped+=("tests/e2e/test_browser.py: Chromium could not be installed")
fi

if [ "${1-}" = gpu ]; then
  shift
  [ $# -gt 0 ] || set -- tests/gpu
  exec $bin/python tests/support/incusd.py run --gpu 1 --image -- $bin/pytest "$@"
fi
if [ $# -gt 0 ]; then
  exec $bin/python tests/support/incusd.py run --image -- $bin/pytest "$@"
fi
$bin/python tests/support/incusd.py run --image -- bash -ec "
  $bin/molecule test
  $bin/pytest tests/e2e
  $bin/pytest -m incus tests/unit
"
if ! reason=$($bin/python tests/support/incusd.py probe --gpu); then
  skipped+=("molecule/gpu and tests/gpu: $reason")
  exit 0
fi
$bin/python tests/support/incusd.py run --gpu 1 --image -- bash -ec "
  $bin/molecule test -s gpu
  $bin/pytest tests/gpu
"
