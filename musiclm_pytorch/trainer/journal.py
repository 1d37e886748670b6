"""What happened when: metrics.jsonl, and curves of it as a picture."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from musiclm_pytorch.atomic import atomic_write


class Journal:
    """Appends metrics to `metrics.jsonl` in a folder, a line each, and draws `curves.png` of them."""

    def __init__(self, folder: Path):
        self.path = folder / 'metrics.jsonl'
        self.picture = folder / 'curves.png'

    def write(self, part: str, step: int, metrics: dict[str, Any]) -> None:
        line = json.dumps(dict(part=part, step=step, **metrics)) + '\n'
        with self.path.open('ab+') as file:
            if file.tell() > 0:
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b'\n':  # the last line was cut short when the process was killed
                    line = '\n' + line
            file.write(line.encode())

    def read(self, part: str) -> list[dict[str, Any]]:
        """The lines of a part, by step; where a run went on from an earlier step, without what came after that."""
        if not self.path.is_file():
            return []
        lines = {}
        for line in self.path.read_text(encoding='utf-8', errors='replace').splitlines():
            try:
                entry = json.loads(line)
            except json.JSONDecodeError:  # cut short when the process was killed
                continue
            if isinstance(entry, dict) and entry.get('part') == part and isinstance(entry.get('step'), int):
                lines = {step: line for step, line in lines.items() if step < entry['step']}
                lines[entry['step']] = entry
        return list(lines.values())

    def draw(self) -> None:
        """Draw the loss and the recalls over steps."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        panels = {
            'loss': [('train', 'loss'), ('valid', 'loss')],
            'learning rate': [('train', 'lr')],
            'recall at 1': [('valid', 'audio_to_text_recall_at_1'), ('valid', 'text_to_audio_recall_at_1')],
        }
        figure = Figure(figsize=(13, 3.6), layout='constrained')
        FigureCanvasAgg(figure)
        for axes, (title, curves) in zip(figure.subplots(1, len(panels)), panels.items()):
            for part, name in curves:
                points = [(line['step'], line[name]) for line in self.read(part) if name in line]
                points = [(step, value) for step, value in points if math.isfinite(value)]
                if points:
                    label = f'{part} {name.replace("_", " ")}'
                    axes.plot(*zip(*points), label=label, marker='.' if len(points) < 40 else None)
            axes.set(title=title, xlabel='step')
            if axes.lines:
                axes.legend(fontsize=8)
        with atomic_write(self.picture) as aside:
            figure.savefig(aside, dpi=110, format='png')
