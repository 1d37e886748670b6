#!/usr/bin/env bash
# torchaudio 2.11.1 beside torch 2.11.0: does a patch release load beside the torch of its own minor version?
#
# Expected: torchaudio 2.11.1 asks for torch>=2.11, its number says the same, pip installs the pair and `pip check` finds
# nothing broken. So it imports, as 2.11.0 does, which asks for nothing at all.
# Seen: the import raises, for its C++ library wants a symbol that torch 2.11.0 does not have. A program that pins torch
# and takes the newest torchaudio of that line stops working on the day of the patch release, and nothing but a bound of
# its own, torchaudio<2.11.1, tells pip.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
pip() { "$folder/venv/bin/pip" --disable-pip-version-check "$@"; }
loads() {
    "$folder/venv/bin/python" - <<'PYTHON'
import sys
from importlib.metadata import requires, version

print('torch', version('torch'), 'torchaudio', version('torchaudio'), 'which asks for', requires('torchaudio'))
try:
    import torchaudio
except (ImportError, OSError) as error:
    sys.exit(f'  raised {type(error).__name__}: {str(error.__cause__ or error).rpartition("/")[2]}')
print('  imported')
PYTHON
}
pip install --quiet 'torch==2.11.0' 'numpy==2.4.6' 'torchaudio==2.11.1'
pip check
if loads; then
    echo 'torchaudio 2.11.1 loads beside torch 2.11.0 now' >&2
    exit 1
fi
pip install --quiet 'torchaudio==2.11.0'
pip check
loads
