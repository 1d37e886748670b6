#!/usr/bin/env bash
# gradio_client 2.7.2 (with gradio 6.31.0): neither of the two switches of its telemetry stops it alone.
#
# A client of an application on the same machine asks for huggingface.co from a thread of its own, seconds later.
# GRADIO_ANALYTICS_ENABLED=False and `Client(analytics_enabled=False)` each look like the way to say no; the constructor
# joins them by `or`, so that either of them left at its default is a yes. A test or a page that must not leave the
# machine needs both (or HF_HUB_DISABLE_TELEMETRY=1).
#
# Expected: either switch is enough.   Seen: only both together are.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet gradio==6.31.0 gradio_client==2.7.2
cat > "$work/look.py" <<'PY'
import os
import sys
import threading
import time

said = sys.argv[1] == 'True'
asked = set()


def audit(event, arguments):
    # the main thread asks for it, too, whatever the switches say
    if event == 'socket.getaddrinfo' and threading.current_thread() is not threading.main_thread():
        asked.add(str(arguments[0]))


sys.addaudithook(audit)
import gradio as gr
from gradio_client import Client

with gr.Blocks(analytics_enabled=False) as page:
    gr.Button('x').click(lambda: None, api_name='nothing')
_, address, _ = page.launch(prevent_thread_lock=True, quiet=True)
asked.clear()
Client(address, verbose=False, analytics_enabled=said)
for _ in range(50):
    if 'huggingface.co' in asked:
        break
    time.sleep(0.1)
print('asks for huggingface.co' if 'huggingface.co' in asked else 'asks for nobody')
os._exit(0)
PY
seen=''
for variable in True False; do
    for argument in True False; do
        found=$(GRADIO_ANALYTICS_ENABLED=$variable "$work/venv/bin/python" "$work/look.py" $argument 2>/dev/null | tail -n 1)
        echo "GRADIO_ANALYTICS_ENABLED=$variable, analytics_enabled=$argument: $found"
        seen="$seen|$found"
    done
done
yes='asks for huggingface.co'
test "$seen" = "|$yes|$yes|$yes|asks for nobody"
