#!/usr/bin/env bash
# ansible-test wants the collection at ansible_collections/sottovoce/stack with only its own files in it:
# give it a copy of what git knows, and run the tests there.
set -eu
root=$(cd "$(dirname "$0")/.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
target=$work/ansible_collections/sottovoce/stack
mkdir -p "$target"
cd "$root"
git ls-files -z --cached --others --exclude-standard -- \
  . ':!demo' ':!gateway' ':!bench' ':!molecule' ':!tests/e2e' ':!tests/support' |
  while IFS= read -r -d '' file; do [ ! -e "$file" ] || printf '%s\0' "$file"; done |
  tar --null --create --files-from=- | tar --extract --directory="$target"
cd "$target"
git init --quiet . && git add --all

# Its virtual environments are kept between runs, beside the checkout's other caches.
# ansible-test drops the environment's pip settings (an index, a CA), so they go into a file.
settings=$("$root/.venv/bin/pip" config list |
  sed -nE "s/^(global|:env:)\.([a-z-]+)='(.*)'\$/\2 = \3/p" | awk -F ' = ' '!seen[$1]++')
export HOME=$root/.cache/ansible-test
mkdir -p "$HOME/.ansible/test/cache" "$HOME/.config/pip"
printf '[global]\n%s\n' "$settings" > "$HOME/.config/pip/pip.conf"
cp "$root/tests/support/get_pip.py" "$HOME/.ansible/test/cache/get_pip_24_2.py"

# The changelog, shell and PowerShell tests need what package registries do not carry or what is not here.
version=$("$root/.venv/bin/python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
"$root/.venv/bin/ansible-test" sanity --color no --python "$version" --requirements \
  --skip-test pslint --skip-test shellcheck "$@"
