"""Music that is heard while it is made: a stream a visitor of a page, some seconds ahead of what is heard."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from musiclm_pytorch.audiolm.generation_args import Prompt
from musiclm_pytorch.audiolm.streaming import MusicStream
from musiclm_pytorch.inference.music_maker import MusicMaker, check_says_something
from musiclm_pytorch.waves import Waves

AHEAD = 4.0  # seconds that are made ahead of what can be heard by now
LAST_STEP = 30.0  # seconds that a step, and showing what was played, may take after the page was closed


@dataclass
class Playing:
    """What a visitor hears: under which prompt, once it is there, and whether it was stopped."""

    prompt: Prompt
    stream: MusicStream | None = None
    stopped: threading.Event = field(default_factory=threading.Event)


class LiveMusic:
    """Streams of visitors, one each.

    Args:
        maker: what checks the requests and makes the music.

    Attributes:
        playing: what plays now, by visitor.
    """

    def __init__(self, maker: MusicMaker):
        self.maker = maker
        self.playing: dict[str, Playing] = {}
        self._answers = 0
        self._changed = threading.Condition()
        self._is_closed = False

    def play(
        self, visitor: str, prompt: Prompt, seconds: float, prime: Any = None, melody: Any = None, **how: Any
    ) -> Iterator[tuple[Waves, Prompt]]:
        """Waves, each with the prompt for which it was made at the latest, until `seconds` are there or `stop` is
        called; arguments as of `MusicMaker.stream`.

        The stream ends with the iterator, also when that is dropped. Raises ValueError for a second stream of a
        visitor, and what `MusicMaker.stream` raises.
        """
        with self._changed:
            if self._is_closed:
                raise ValueError('the page is being closed')
            if visitor in self.playing:
                raise ValueError('music is playing here already; stop it first')
            own = self.playing[visitor] = Playing(prompt)
        try:
            with self.maker.stream(prompt, seconds, prime, melody, **how) as own.stream:
                begin, made, prompt = None, 0.0, own.prompt
                for wave in own.stream:
                    yield wave, prompt
                    begin = time.monotonic() if begin is None else begin
                    made += len(wave) / wave.sample_rate
                    if own.stopped.wait(max(0.0, begin + made - AHEAD - time.monotonic())):
                        return
                    prompt = own.prompt  # one that comes while the next wave is made is that of the wave after it
        finally:
            with self._changed:
                del self.playing[visitor]
                self._changed.notify_all()

    @contextlib.contextmanager
    def answering(self) -> Iterator[None]:
        """While a visitor is still shown what was played: `close` waits for that, too."""
        with self._changed:
            self._answers += 1
        try:
            yield
        finally:
            with self._changed:
                self._answers -= 1
                self._changed.notify_all()

    def set_prompt(self, visitor: str, prompt: Prompt) -> None:
        """Another prompt for what a visitor hears. Raises ValueError if nothing plays."""
        check_says_something(prompt)
        own = self.playing.get(visitor)
        if own is None or own.stream is None:
            raise ValueError('nothing plays here whose prompt could change; play something first')
        own.stream.set_prompt(prompt)
        own.prompt = prompt

    def stop(self, visitor: str) -> None:
        """End what a visitor hears, if anything, after the wave that is being made."""
        if (own := self.playing.get(visitor)) is not None:
            own.stopped.set()

    def close(self) -> None:
        """End all, and wait until they have."""
        with self._changed:
            self._is_closed = True
            for own in self.playing.values():
                own.stopped.set()
            self._changed.wait_for(lambda: not self.playing and not self._answers, timeout=LAST_STEP)
