#!/usr/bin/env bash
# Makes the environment of `make`: a Python for which the locked wheels exist, vLLM for the CPU, the tools, this checkout.
#
#     requirements/setup.sh VENV [PYTHON]
#
# Says what it does; what pip says goes to VENV/setup.log.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=$1 python=${2:-} log=$1/setup.log
torch=$(grep '^torch==' requirements/cpu.txt)  # the one locked wheel that is not there for every Python and index
index=https://download.pytorch.org/whl/cpu
quietly="--disable-pip-version-check --no-input --no-deps --no-compile"  # modules are compiled when first imported

# Counts what pip names on its way; a line that is written again and again on a terminal, elsewhere a line now and then.
show() {
  awk -v title="$1" -v total="$2" -v terminal="$([ -t 1 ] && echo 1 || echo 0)" '
    function tell(what, n) {
      if (terminal) printf "\r\033[K%s: %s %d of %d", title, what, n, total
      else if (n % 40 == 1 || what == "installing") printf "%s: %s %d of %d\n", title, what, n, total
      fflush()
    }
    /^(Collecting|Processing|Requirement already)/ { tell("looked up", ++found) }
    /^ *(Downloading|Using cached) [^ ]*(whl|tar\.gz)( |$)/ { tell("fetched", ++fetched) }
    /^Installing collected/ { tell("installing", total) }
    END { if (terminal) printf "\r\033[K"; printf "%s: done\n", title }'
}

# pip_install TITLE PACKAGES ARGUMENTS...
pip_install() {
  local title=$1 total=$2
  shift 2
  # shellcheck disable=SC2086
  "$venv/bin/python" -m pip install $quietly "$@" 2>&1 | tee -a "$log" | show "$title" "$total" || {
    echo "$title: failed; pip's last words (all of them are in $log):" >&2
    tail -n 12 "$log" >&2
    exit 1
  }
}

# A virtual environment of this Python with the locked torch; says why not.
try() {
  local path version
  path=$(command -v "$1") || { echo "$1: not there"; return 1; }
  version=$("$path" -c 'import sys; print("%d.%d.%d" % sys.version_info[:3]); sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))') || {
    echo "$path: Python ${version:-unknown}, but 3.11 to 3.13 are needed"; return 1; }
  rm -rf "$venv"
  "$path" -m venv "$venv" || { echo "$path: cannot make virtual environments (on Debian: apt install python${version%.*}-venv)"; return 1; }
  echo "Trying Python $version ($path) with $torch ..."
  # shellcheck disable=SC2086
  "$venv/bin/python" -m pip install $quietly "$torch" >>"$log" 2>&1 ||
    "$venv/bin/python" -m pip install $quietly --extra-index-url "$index" "$torch" >>"$log" 2>&1 ||
    { echo "$path: pip finds no $torch for Python $version"; grep '^ERROR' "$log" | tail -n 1; return 1; }
  echo "Chose Python $version ($path)"
}

if [ -z "$python" ] && [ -f "$log" ] && "$venv/bin/python" -c 'import torch' 2>/dev/null; then
  echo "Keeping $("$venv/bin/python" --version) in $venv"
else
  chosen=
  for candidate in ${python:-python3.11 python3.12 python3.13 python3}; do
    if try "$candidate"; then chosen=$candidate; break; fi
  done
  if [ -z "$chosen" ]; then
    rm -rf "$venv"
    echo "No Python from 3.11 to 3.13 with the locked packages was found; name one: make PYTHON=/path/to/python3.11" >&2
    exit 1
  fi
fi
begin=$SECONDS
for lock in cpu dev; do
  title="Packages of requirements/$lock.txt"
  pip_install "$title" "$(grep -c == requirements/$lock.txt)" -r requirements/$lock.txt
done
pip_install "vllm-longctx" 2 --no-build-isolation ./requirements/vllm-metadata -e .
echo "The environment $venv is ready after $((SECONDS - begin)) s"
