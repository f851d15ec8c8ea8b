#!/usr/bin/env bash
# Rewrites requirements/*.txt with the SHA-256 of every file that the package index has of each
# release, for every platform: pip then installs no file that is not listed. Versions stay as they
# are. Then writes docs/licenses.md and requirements/sbom.json of what is installed in .venv.
# Usage: make lock
set -euo pipefail
cd "$(dirname "$0")/.."
tools=$(mktemp -d)
trap 'rm -rf "$tools"' EXIT
"${PYTHON:-python3}" -m venv "$tools"
"$tools/bin/pip" install --quiet --disable-pip-version-check uv==0.13.9 cyclonedx-bom==7.5.0

for file in requirements/*.txt; do
  grep -hE '^(#|-r )' "$file" > "$tools/head" || true
  sed -E 's/ *\\$//' "$file" | grep -E '^[A-Za-z0-9]' | sed -E 's/ +--hash=.*//' > "$tools/pins.in"
  "$tools/bin/uv" pip compile --quiet --no-deps --generate-hashes --no-header --no-annotate \
    --python-version 3.11 "$tools/pins.in" --output-file "$tools/pins.txt"
  cat "$tools/head" "$tools/pins.txt" > "$file"
  echo "$file: $(grep -c '==' "$file") releases, $(grep -c 'hash=' "$file") files"
done

"${VENV_PYTHON:-.venv/bin/python}" requirements/licenses.py > docs/licenses.md
"$tools/bin/cyclonedx-py" requirements --output-reproducible --of JSON \
  -o requirements/sbom.json requirements/run.txt
echo "docs/licenses.md, requirements/sbom.json"
