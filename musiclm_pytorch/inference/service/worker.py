"""The one thread that runs the model, and what waits for it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from musiclm_pytorch.audiolm.streaming import MusicStream
from musiclm_pytorch.data.audio import AudioFile
from musiclm_pytorch.inference.batches import check_words, plain, window_and_hop
from musiclm_pytorch.inference.engine import BatchInferenceEngine
from musiclm_pytorch.inference.optimize import OptimizedMuLaN
from musiclm_pytorch.mulan.model import JointEmbedding
from musiclm_pytorch.musiclm import Music, MusicLM

TEXTS_AT_A_TIME = 256  # of several requests


class Abandoned(Exception):
    """No one waits for the result any more."""


class Unreadable(ValueError):
    """A sound file that does not decode, or that the model does not take."""


class Job:
    """A piece of work for the model.

    Attributes:
        future: its result; cancelled, it is not begun.
    """

    def __init__(self):
        self.future: Future = Future()
        self._abandoned = False

    def abandon(self) -> None:
        """Do not begin, or stop at the next `check`."""
        self._abandoned = True
        self.future.cancel()

    def check(self, *_: Any) -> None:
        """Raises Abandoned if no one waits any more."""
        if self._abandoned:
            raise Abandoned


class ModelWorker:
    """Jobs for a model, done one after another in a thread of its own, which torch then has to itself.

    Texts that wait are embedded together, whichever jobs they belong to.

    Raises ValueError for a model that cannot serve: see `create_service`.
    """

    def __init__(self, model: JointEmbedding | OptimizedMuLaN | MusicLM):
        self.engine = BatchInferenceEngine(model)
        self.musiclm, self.mulan = self.engine.musiclm, plain(self.engine.mulan)
        self.window, self.hop = window_and_hop(self.mulan, None, None)
        check_words(self.mulan)
        if self.musiclm is not None:
            self.musiclm.check_fitted()
        self.streams: dict[str, MusicStream | None] = {}  # that play, each in a thread of its own
        self._texts: deque[tuple[Job, Sequence[str]]] = deque()
        self._jobs: set[Job] = set()  # without a result
        self.is_stopping = False
        self._thread = _thread()

    @property
    def sample_rate(self) -> int:
        """Of the sound that the model hears, in Hz."""
        return self.mulan.sample_rate

    @property
    def shortest(self) -> float:
        """Seconds of sound that MuLaN needs."""
        return self.mulan.audio.min_samples / self.sample_rate

    def submit(self, work: Callable[..., Any], *arguments: Any) -> Job:
        """A job whose result is `work(job, *arguments)`."""
        job = self._new_job()
        self._thread.submit(_finish, [job], lambda: [work(job, *arguments)])
        return job

    def _new_job(self) -> Job:
        job = Job()
        if self.is_stopping:
            job.abandon()
        self._jobs.add(job)
        job.future.add_done_callback(lambda _: self._jobs.discard(job))
        return job

    def stop(self, now: bool = False) -> None:
        """Begin no job any more: those that wait, and new ones, are cancelled, and streams end. With `now` the one that
        runs is cancelled too, at its next `check`."""
        self.is_stopping = True
        for job in list(self._jobs):
            if now or not job.future.running():
                job.abandon()
        for stream in filter(None, list(self.streams.values())):
            stream.close()

    def close(self) -> None:
        """Wait for the job that runs, and drop the others. The next one begins anew."""
        self._texts.clear()
        self._thread.shutdown(cancel_futures=True)
        self._thread, self.is_stopping = _thread(), False

    # what is done

    def embed_texts(self, texts: Sequence[str]) -> Job:
        """A job whose result is `(n, dim_latent)`."""
        job = self._new_job()
        self._texts.append((job, texts))
        self._thread.submit(self._embed_waiting_texts)
        return job

    def embed(self, files: Sequence[AudioFile], texts: Sequence[str]) -> Job:
        """A job whose results are the latents of files and of texts, `(n, dim_latent)` each."""
        return self.submit(self._embed, files, texts)

    def generate(self, prompts: Sequence[str], **keywords: Any) -> Job:
        """A job whose result is a `Music` of all samples; keywords as `MusicLM` takes them."""
        return self.submit(self._generate, prompts, keywords)

    def _embed_waiting_texts(self) -> None:
        taken: list[tuple[Job, Sequence[str]]] = []
        total = 0
        # none are left where a turn before took them
        while self._texts and (not taken or total + len(self._texts[0][1]) <= TEXTS_AT_A_TIME):
            job, texts = self._texts.popleft()
            if not job.future.cancelled():
                taken.append((job, texts))
                total += len(texts)

        def embed() -> tuple[Tensor, ...]:
            latents = self.engine.embed_texts([text for _, texts in taken for text in texts])
            return latents.split([len(texts) for _, texts in taken])

        _finish([job for job, _ in taken], embed)

    def _embed(self, job: Job, files: Sequence[AudioFile], texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        latents = [torch.empty(0, self.mulan.dim_latent, dtype=torch.float32)]
        for file in files:
            job.check()
            try:
                latents.append(self.mulan.embed_audio(file, self.window, self.hop).float().cpu()[None])
            except ValueError as error:
                raise Unreadable(str(error) if file.name in str(error) else f'{file.name}: {error}') from error
        return torch.cat(latents), self.engine.embed_texts(texts)

    def _generate(self, job: Job, prompts: Sequence[str], keywords: dict[str, Any]) -> Music:
        music = self.musiclm(prompts, return_all=True, return_scores=True, progress=job.check, **keywords)
        return Music(music.waves.cpu(), music.scores.cpu(), music.seeds)


def _thread() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(1, thread_name_prefix='model')  # which it starts when there is something to do


def _finish(jobs: Sequence[Job], work: Callable[[], Sequence[Any]]) -> None:
    """Give the jobs that someone waits for the results of `work`, one each, or its error."""
    wanted = [job.future.set_running_or_notify_cancel() for job in jobs]
    if not any(wanted):
        return
    waiting = [job.future for job, it in zip(jobs, wanted) if it]
    try:
        results = work()
    except BaseException as error:  # whatever it is, it must not leave them waiting
        for future in waiting:
            future.set_exception(error)
        return
    for future, result in zip(waiting, (it for it, is_wanted in zip(results, wanted) if is_wanted)):
        future.set_result(result)
