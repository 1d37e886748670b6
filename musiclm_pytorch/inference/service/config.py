"""What the HTTP service allows. Nothing heavy is loaded with it, so that the command line can tell its options."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from musiclm_pytorch.inference.config import checked_fields


@dataclass(frozen=True)
class ServiceConfig:
    """What the service allows. Fields are given by name.

    Attributes:
        max_requests: requests that are read, wait or are computed at once; one more gets 503. So the service holds at
            most this many bodies in memory.
        timeout: seconds that a body may take to arrive (408), and that its answer may take from then on (504).
        max_body_bytes: size of a request, whether or not it tells its length (413).
        max_texts: texts in a request.
        max_text_chars: characters of a text or prompt.
        max_files: sound files in a request.
        max_audio_seconds: length of the sound files of a request together.
        max_pieces: pieces of music in a request, prompts × samples.
        max_seconds: length of a piece of music.
        max_streams: streams of music that play at once; one more gets 503.

    Raises:
        TypeError: an unknown field or a value of a wrong type. ValueError: a value that is not above 0.
    """

    max_requests: int = 64
    timeout: float = 120.0
    max_body_bytes: int = 32 * 2**20
    max_texts: int = 256
    max_text_chars: int = 2000
    max_files: int = 16
    max_audio_seconds: float = 600.0
    max_pieces: int = 8
    max_seconds: float = 30.0
    max_streams: int = 2

    def __post_init__(self):
        from musiclm_pytorch.checks import check_positive

        check_positive(**self.to_dict())

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


ServiceConfig.__init__ = checked_fields(ServiceConfig.__init__)
