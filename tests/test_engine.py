"""Batches of files and texts against one at a time, music in batches, and sound by gradient ascent."""

import logging
import math

import numpy as np
import pytest
import soundfile
import torch
from helpers.models import tiny_mulan

from musiclm_pytorch import MusicLM
from musiclm_pytorch.inference import batches
from musiclm_pytorch.inference import engine as module
from musiclm_pytorch.inference.config import InferenceConfig
from musiclm_pytorch.inference.engine import BatchInferenceEngine
from musiclm_pytorch.inference.optimize import OptimizedMuLaN
from musiclm_pytorch.inference.synthesis import synthesise, wave_of
from musiclm_pytorch.inference.workers import AHEAD, workers

RATE = 8000
PLAIN = dict(use_mixed_precision=False, device='cpu')


def mulan(**audio):
    torch.manual_seed(0)
    return tiny_mulan(dict(audio_sample_rate=RATE, **audio), dict(num_tokens=49408, max_seq_len=20)).eval()


def config(batch_size=8, **keywords):
    return InferenceConfig(batch_size=batch_size, **(PLAIN | keywords))


@pytest.fixture(scope='module')
def musiclm():
    return MusicLM.from_pretrained('tiny')


@pytest.fixture(scope='module')
def tiny(musiclm):
    return musiclm.mulan_embed_quantizer.mulan


@pytest.fixture(params=[1, 2], ids='{} threads'.format)
def threads(request):
    """Batches one after another, and side by side."""
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(1)


def write(path, samples, rate=RATE, channels=1, subtype=None):
    random = np.random.default_rng(samples)
    soundfile.write(path, random.uniform(-0.3, 0.3, (samples, channels)), rate, subtype)
    return path


@pytest.fixture
def files(tmp_path):
    """Of many lengths, rates and channels; one is two windows and a half long."""
    sizes = [2000, 9000, 2000, 1700, 20000, 8000, 2500, 8001, 3000, 2001]
    paths = [write(tmp_path / f'{i}.wav', size) for i, size in enumerate(sizes)]
    paths.insert(2, write(tmp_path / 'stereo.flac', 9999, 11025, 2))
    paths.insert(5, write(tmp_path / 'high.ogg', 30000, 44100))
    return paths


# ---- files ----


@pytest.mark.parametrize(('batch_size', 'variable'), [(1, False), (3, True), (16, True)])
def test_latents_are_those_of_each_file_alone(files, batch_size, variable):
    model = mulan(support_variable_length=variable).train()
    found = BatchInferenceEngine(model, config(batch_size)).embed_audio_files(iter(files), window=1.0, hop=0.75)
    assert found.paths == files
    assert found.skipped == {}
    alone = torch.stack([model.embed_audio(path, window=1.0, hop=0.75) for path in files])
    assert torch.allclose(found.latents, alone, atol=1e-5)
    assert not torch.allclose(found.latents, alone.roll(1, 0), atol=1e-3)
    # and the model is as it was
    assert model.training
    assert model.audio.training
    assert model.audio.support_variable_length == variable


def test_windows_follow_each_other_by_default(files):
    model = mulan(max_audio_length=RATE)
    found = BatchInferenceEngine(model).embed_audio_files(files)
    alone = torch.stack([model.embed_audio(path, window=1.0, hop=1.0) for path in files])
    assert torch.allclose(found.latents, alone, atol=1e-5)


def test_an_optimized_model_and_that_of_a_musiclm_embed(files, musiclm, tiny):
    model, texts = mulan(), ['a flute', 'two very slow organs']
    optimized = BatchInferenceEngine(OptimizedMuLaN(model, config()), config())
    wanted = BatchInferenceEngine(model).embed_audio_files(files[:4])
    assert torch.allclose(optimized.embed_audio_files(files[:4]).latents, wanted.latents, atol=1e-5)
    assert torch.allclose(optimized.embed_texts(texts), model.get_text_latents(raw_texts=texts), atol=1e-5)
    found = BatchInferenceEngine(musiclm).embed_audio_files(files[:1])
    assert torch.allclose(found.latents[0], tiny.embed_audio(files[0]), atol=1e-5)


def test_files_that_cannot_be_read_are_reported_and_skipped(files, tmp_path, caplog, threads):
    model = mulan()
    engine = BatchInferenceEngine(model, config(3))
    wanted = engine.embed_audio_files(files, window=1.0)
    (tmp_path / 'text.wav').write_text('no sound')
    write(tmp_path / 'short.wav', 20)
    write(tmp_path / 'nothing.wav', 0)
    soundfile.write(tmp_path / 'nan.wav', np.r_[np.zeros(20000), math.nan], RATE, 'FLOAT')
    whole = write(tmp_path / 'cut.flac', 40000).read_bytes()
    (tmp_path / 'cut.flac').write_bytes(whole[: len(whole) // 2])
    bad = [tmp_path / name for name in ('text.wav', 'short.wav', 'nothing.wav', 'nan.wav', 'cut.flac', 'nowhere.wav')]
    mixed = list(files)
    for place, path in zip((0, 3, 5, 9, 14, 17), bad):
        mixed.insert(place, path)
    steps = []
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        found = engine.embed_audio_files(mixed, window=1.0, progress=lambda done, total: steps.append((done, total)))
    assert found.paths == files
    assert torch.allclose(found.latents, wanted.latents, atol=1e-5)
    assert list(found.skipped) == [str(path) for path in mixed if path in bad]
    reasons = [found.skipped[str(path)] for path in bad]
    says = ['cannot be read as audio', 'got 20', 'got 0', 'holds NaN', 'cut.flac', 'no audio file at']
    assert all(map(str.__contains__, reasons, says)), reasons
    told = [f'skipped {path}: {reason}' for path, reason in found.skipped.items()]
    assert [record.getMessage() for record in caplog.records] == told
    assert steps[-1] == (18, 18)
    assert [done for done, _ in steps] == sorted(done for done, _ in steps)


def test_what_the_model_cannot_take_is_skipped_alone(files, tmp_path):
    soundfile.write(tmp_path / 'loud.wav', np.full(9000, 1e30), RATE, 'FLOAT')
    engine = BatchInferenceEngine(mulan(), config(16))
    wanted = engine.embed_audio_files(files, window=1.0)
    found = engine.embed_audio_files([*files[:4], tmp_path / 'loud.wav', *files[4:]], window=1.0)
    assert torch.allclose(found.latents, wanted.latents, atol=1e-5)
    assert list(found.skipped) == [str(tmp_path / 'loud.wav')]
    assert found.skipped[str(tmp_path / 'loud.wav')].startswith('the audio is so loud that its spectrogram overflows')


def test_a_caller_who_gives_up_stops_the_workers(files):
    asked = []

    def read(item):
        asked.append(item)
        return item

    torch.set_num_threads(2)
    try:
        with workers(2) as run:
            given = run(read, range(1000))
            assert [next(given) for _ in range(6)] == [0, 1, 2, 3, 4, 5]
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
    assert len(asked) <= 5 + 2 * AHEAD + 2


def test_what_goes_wrong_reaches_the_caller(files, threads):
    def give_up(*_):
        raise KeyboardInterrupt

    model = mulan()
    engine = BatchInferenceEngine(model, config(1))
    with pytest.raises(KeyboardInterrupt):
        engine.embed_audio_files(files, progress=give_up)
    model.audio.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        BatchInferenceEngine(model, config(1)).embed_audio_files(files)
    assert torch.get_num_threads() == threads


def test_nothing_readable_and_nothing_at_all_give_no_latents(tmp_path):
    engine = BatchInferenceEngine(mulan())
    for paths in ([], [tmp_path / 'nowhere.wav']):
        found = engine.embed_audio_files(paths)
        assert found.latents.shape == (0, 16)
        assert found.paths == []
        assert len(found.skipped) == len(paths)


def test_long_audio_is_never_in_memory_as_a_whole(tmp_path, monkeypatch):
    path = write(tmp_path / 'long.wav', 300 * 1000)
    model, spans, ahead = mulan(), [], []
    embedded = 0
    read, embed = batches.AudioFile.read, module.embed_waves

    def counting_read(file, start, stop):
        spans.append(stop - start)
        ahead.append(len(spans) - embedded)
        return read(file, start, stop)

    def counting_embed(embeds, waves):
        nonlocal embedded
        found = embed(embeds, waves)
        embedded += len(waves)
        return found

    monkeypatch.setattr(batches.AudioFile, 'read', counting_read)
    monkeypatch.setattr(module, 'embed_waves', counting_embed)
    found = BatchInferenceEngine(model, config(2)).embed_audio_files([path], window=0.125)
    assert embedded == len(spans) == 300
    assert set(spans) == {1000}
    assert max(ahead) <= 2 * (AHEAD + 2)  # and the batch that is being embedded
    monkeypatch.undo()
    assert torch.allclose(found.latents[0], model.embed_audio(path, window=0.125, hop=0.125), atol=1e-5)


def test_bad_calls_are_told(files):
    engine = BatchInferenceEngine(mulan())
    for keywords, says in (
        (dict(window=0.0), 'window must be greater than 0'),
        (dict(hop=-1.0), 'hop must be greater than 0'),
        (dict(window=0.001), r'takes .* s at once, but window is 0.001 s'),
    ):
        with pytest.raises(ValueError, match=says):
            engine.embed_audio_files(files, **keywords)
    with pytest.raises(ValueError, match='takes .* to 1 s at once, but window is 2 s'):
        BatchInferenceEngine(mulan(max_audio_length=RATE)).embed_audio_files(files, window=2.0)
    with pytest.raises(TypeError, match='put one path in a list'):
        engine.embed_audio_files(str(files[0]))
    for model in (tiny_mulan(), mulan(accept_spec=True)):
        with pytest.raises(ValueError, match='takes spectrograms or does not know its sample rate'):
            BatchInferenceEngine(model).embed_audio_files(files)
    with pytest.raises(TypeError):
        BatchInferenceEngine(torch.nn.Linear(1, 1))


# ---- texts ----


def test_texts_come_in_order_and_with_their_like(monkeypatch):
    model = mulan()
    words = ['one', 'two', 'three', 'four', 'five', 'six', 'seven', 'eight']
    texts = [' '.join(words[: 1 + (5 * i) % 8]) for i in range(13)] + ['', 'hey !', 'hey']
    monkeypatch.setattr(module, 'LOOK_AHEAD', 12)
    with torch.no_grad():
        alone = torch.cat([model.get_text_latents(raw_texts=[text]) for text in texts])
    seen = []
    found = BatchInferenceEngine(model, config(3)).embed_texts(texts)
    assert torch.allclose(found, alone, atol=1e-5)
    assert BatchInferenceEngine(model).embed_texts([]).shape == (0, 16)
    with pytest.raises(TypeError, match='list of strings'):
        BatchInferenceEngine(model).embed_texts('a flute')
    model.text.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape))
    BatchInferenceEngine(model).embed_texts(['one', ' '.join(words), 'two'] * 4)
    assert [tuple(shape) for shape in seen] == [(12, 8)]
    seen.clear()
    monkeypatch.setattr(module, 'LOOK_AHEAD', 100)
    BatchInferenceEngine(model).embed_texts(['one', ' '.join(words), 'two'] * 8)
    assert [tuple(shape) for shape in seen] == [(16, 1), (8, 8)]


# ---- text to music ----


def test_music_is_made_with_its_like_and_is_that_of_musiclm(musiclm):
    calls = []
    hook = musiclm.register_forward_pre_hook(
        lambda _, args, given: calls.append((args[0], round(given['seconds'] * 16000))), with_kwargs=True
    )
    engine = BatchInferenceEngine(musiclm, config())
    shapes = [(4001,), (1, 900), (2, 1, 3200), (1,)]
    found = engine.process_text_to_audio_batch(list('abcd'), shapes, seed=5)
    hook.remove()
    assert [wave.shape for wave in found] == shapes
    assert calls == [(['d'], 1), (['b'], 900), (['c', 'a'], 4001)]
    for row, (text, shape) in enumerate(zip('abc', shapes)):  # by its own seed alone
        own = musiclm(text, seconds=4001 / 16000 if text in 'ac' else 900 / 16000, seed=5 + row)[0, : shape[-1]]
        assert torch.allclose(found[row], own.expand(shape), atol=1e-4)
        assert own.std() > 1e-3


# ---- text to sound, by MuLaN alone ----


def test_ascent_brings_sound_to_its_text(tiny, caplog):
    texts = ['a slow low organ', 'a fast high flute']
    engine = BatchInferenceEngine(tiny, config())
    shapes = [(8000,), (1, 8000)]
    with caplog.at_level(logging.WARNING):
        found = engine.process_text_to_audio_batch(texts, shapes, steps=40)
        engine.process_text_to_audio_batch(texts[:1], shapes[:1], steps=1)
    assert [record.getMessage()[:22] for record in caplog.records] == ['a MuLaN has no decoder']  # once
    assert [wave.shape for wave in found] == [(8000,), (1, 8000)]
    waves = torch.stack([wave.flatten() for wave in found])
    assert waves.abs().max() <= 1
    assert 0.1 < waves.std() < 0.3
    noise = wave_of(torch.randn(1, 4001, 2, generator=torch.Generator().manual_seed(0)), 8000)
    with torch.no_grad():
        wanted = tiny.get_text_latents(raw_texts=texts)
        similarities = tiny.get_audio_latents(waves) @ wanted.T
        before = tiny.get_audio_latents(noise) @ wanted[0]
    # own text, the other's, and where it began
    assert similarities.diag().min() > 0.8
    assert max(similarities[0, 1], similarities[1, 0]) < 0.4
    assert before < 0.4
    assert all(weight.grad is None for weight in tiny.parameters())
    # what stands in 16 bits sounds the same
    with torch.no_grad():
        rounded = tiny.get_audio_latents((waves * 32767).round() / 32767)
    assert torch.allclose((rounded * wanted).sum(1), similarities.diag(), atol=0.02)


def test_a_model_without_gradients_makes_no_sound(tiny):
    engine = BatchInferenceEngine(OptimizedMuLaN(tiny, config(use_mixed_precision=True)))
    with pytest.raises(ValueError, match='half precision has no gradients to make sound by'):
        engine.process_text_to_audio_batch(['a slow low organ'], [(8000,)], steps=1)


@pytest.mark.slow
def test_a_compiled_model_makes_the_same_sound(tiny):
    compiled = BatchInferenceEngine(OptimizedMuLaN(tiny, config(compile_model=True)), config())
    plain = BatchInferenceEngine(tiny, config())
    found, wanted = (
        it.process_text_to_audio_batch(['a slow low organ'], [(8000,)], steps=3, seed=1) for it in (compiled, plain)
    )
    torch.testing.assert_close(found, wanted, atol=1e-3, rtol=0)


def test_more_steps_bring_it_nearer_and_seeds_differ():
    model = mulan().train()

    def similarity(wave):
        with torch.no_grad():
            return float(model.eval().get_audio_latents(wave[None]) @ model.get_text_latents(raw_texts=['a flute'])[0])

    (few,), (more,) = (synthesise(model, ['a flute'], [(2000,)], steps=steps) for steps in (1, 30))
    assert similarity(more) > similarity(few) + 0.2
    (again,), (other,) = (synthesise(model, ['a flute'], [(2000,)], steps=30, seed=seed) for seed in (0, 1))
    assert torch.equal(again, more)
    assert not torch.allclose(other, more, atol=0.1)


def test_what_a_text_gives_does_not_depend_on_its_neighbours():
    model = mulan()
    texts, shapes = ['a flute', 'an organ', 'a choir'], [(1500,), (2, 900), (1500,)]
    together = synthesise(model, texts, shapes, steps=3)
    apart = synthesise(model, texts, shapes, steps=3, batch_size=1)
    for one, other, shape in zip(together, apart, shapes):
        assert one.shape == shape
        assert torch.allclose(one, other, atol=1e-3)
    assert torch.equal(together[1][0], together[1][1])


@pytest.mark.parametrize('samples', [1, 90])
def test_sound_shorter_than_a_patch_has_its_shape(samples):
    (wave,) = synthesise(mulan(), ['a flute'], [(3, samples)], steps=2)
    assert wave.shape == (3, samples)
    assert wave.isfinite().all()
    assert wave.abs().max() > 0


def test_long_sound_is_made_in_pieces():
    model = mulan(max_audio_length=1000)
    seen = []
    model.audio.register_forward_pre_hook(lambda _, inputs: seen.append(tuple(inputs[0].shape)))
    steps = []
    (wave,) = synthesise(model, ['a flute'], [(2999,)], steps=20, batch_size=2, progress=lambda *it: steps.append(it))
    assert wave.shape == (2999,)
    assert set(seen) == {(2, 1000), (1, 999)}
    assert steps[-1] == (40, 40)
    with torch.no_grad():
        text = model.get_text_latents(raw_texts=['a flute'])
        pieces = [model.get_audio_latents(piece[None]) @ text[0] for piece in wave.split([999, 1000, 1000])]
    assert min(pieces) > 0.5
    assert not torch.allclose(wave[999:1999], wave[1999:], atol=0.1)


@pytest.mark.parametrize(('time_first', 'shape'), [(True, (80, 1024)), (False, (65, 40))])
def test_a_model_of_spectrograms_gives_spectrograms(time_first, shape):
    model = tiny_mulan(
        dict(accept_spec=True, accept_spec_time_first=time_first, depth=1), dict(num_tokens=49408, depth=1)
    ).eval()
    engine = BatchInferenceEngine(model)
    (start,), (found,) = (engine.process_text_to_audio_batch(['a flute'], [shape], steps=steps) for steps in (1, 10))
    assert found.shape == shape
    with torch.no_grad():
        text = model.get_text_latents(raw_texts=['a flute'])[0]
        before, after = (model.get_audio_latents(it[None]) @ text for it in (start, found))
    assert after > before + 0.1
    with pytest.raises(ValueError, match='takes spectrograms .* of at least'):
        engine.process_text_to_audio_batch(['a flute'], [(15, 200)])
    with pytest.raises(ValueError, match='takes spectrograms .* of at least'):
        engine.process_text_to_audio_batch(['a flute'], [(2000,)])


@pytest.mark.parametrize(
    ('texts', 'shapes', 'error', 'says'),
    [
        ([], [], ValueError, 'got 0 texts and 0 audio_shapes'),
        (['a'], [(100,), (100,)], ValueError, 'got 1 texts and 2 audio_shapes'),
        (['a', ' '], [(100,), (100,)], ValueError, r'texts\[1\] is empty'),
        (['a'], [()], ValueError, r'audio_shapes\[0\] must be one or more positive numbers, got \(\)'),
        (['a'], [(80, 0)], ValueError, r'audio_shapes\[0\] must be one or more positive numbers'),
        (['a'], [(80.5,)], TypeError, 'audio_shapes'),
        ('a', [(100,)], TypeError, 'list of strings'),
    ],
)
def test_bad_texts_and_shapes_are_told(texts, shapes, error, says):
    engine = BatchInferenceEngine(mulan())
    with pytest.raises(error, match=says):
        engine.process_text_to_audio_batch(texts, shapes)


def test_a_model_of_nan_is_told():
    model = mulan()
    with torch.no_grad():
        model.audio_to_latents.weight.fill_(math.nan)
    with pytest.raises(ValueError, match='is NaN or infinite'):
        synthesise(model, ['a flute'], [(1000,)])
