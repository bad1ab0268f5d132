#!/usr/bin/env bash
# Create or refresh .venv: the package in editable mode with its `dev` extra, at the pins of constraints.txt.
#   PYTHON=python3.12 tools/setup.sh        another interpreter (3.10 or newer)
#   TORCH="torch==2.13.0" tools/setup.sh    another build of the pinned torch (a wheel, or with pip options)
# torch follows the machine: the CUDA build where nvidia-smi answers, else a CPU build and never a CUDA package.
# To choose again on a machine that has changed, delete .venv first.
set -euo pipefail
cd "$(dirname "$0")/.."

venv_python=.venv/bin/python
log=.venv/setup.log
pinned_torch=$(sed -n 's/^torch==\([^ ;]*\).*/\1/p' constraints.txt)
pytorch_cpu_index=https://download.pytorch.org/whl/cpu
export DS_BUILD_OPS=0 PIP_DISABLE_PIP_VERSION_CHECK=1 # DeepSpeed compiles no ops: training here needs none

step() { # step NAME COMMAND...: run it, print one line with its seconds; show the end of the log if it fails
    local name=$1 start=$SECONDS
    shift
    printf '%-48s' "$name"
    if "$@" >>"$log" 2>&1; then echo "$((SECONDS - start)) s"; else
        echo "failed after $((SECONDS - start)) s; $log ends with:"
        tail -n 15 "$log" >&2
        exit 1
    fi
}

pip_install() { "$venv_python" -m pip install --constraint constraints.txt "$@"; }

torch_is_there() {
    "$venv_python" -c "from importlib.metadata import version; assert version('torch').split('+')[0] == '$pinned_torch'"
} 2>/dev/null

# `+cpu` names a CPU build, so neither attempt can resolve to CUDA packages, and nothing large is fetched to find out.
# The indexes that pip is configured with come first; PyTorch's own gets seconds, not minutes, to answer.
install_cpu_torch() {
    pip_install "torch==$pinned_torch+cpu" ||
        pip_install "torch==$pinned_torch+cpu" --extra-index-url "$pytorch_cpu_index" --timeout 10 --retries 1 || {
        echo "No CPU build of torch $pinned_torch: $pytorch_cpu_index is not reachable and no configured index has one."
        echo "The build on PyPI pulls in gigabytes of CUDA packages, and no NVIDIA driver answers on this machine."
        echo "Make that index reachable, or name a wheel:  TORCH=path/to/torch.whl make setup"
        echo "To take what your index has, CUDA or not:    TORCH=torch==$pinned_torch make setup"
        return 1
    }
}

if ! "$venv_python" -m pip --version >/dev/null 2>&1; then
    python=${PYTHON:-python3}
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || {
        echo "$python is missing or older than Python 3.10. Name a newer one: PYTHON=python3.12 make setup" >&2
        exit 1
    }
    mkdir -p .venv
    step "virtual environment" "$python" -m venv .venv
fi

: >"$log"
step "pip" pip_install pip
if [ -n "${TORCH:-}" ]; then
    # shellcheck disable=SC2086  # pip options in TORCH are separate words
    step "torch as given: $TORCH" pip_install $TORCH
elif torch_is_there; then
    echo "torch $pinned_torch is there"
elif nvidia-smi >/dev/null 2>&1 || [ "$(uname -s)" != Linux ]; then
    step "torch $pinned_torch" pip_install "torch==$pinned_torch"
else
    step "torch $pinned_torch, CPU build" install_cpu_torch
fi
step "spd_lightning[dev]" pip_install --editable ".[dev]"
