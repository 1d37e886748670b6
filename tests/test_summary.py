import pytest
import torch
import torch.nn.functional as F

from musiclm_pytorch.mulan.spectrogram import LogMel, Spectrogram
from musiclm_pytorch.mulan.summary import PITCH_CLASSES, Chroma, ClipSummary, tempogram

RATE, HOP = 8000, 160


def pitches(hertz, seconds=1.0):
    time = torch.arange(int(seconds * RATE)) / RATE
    return torch.stack([torch.sin(2 * torch.pi * it * time) for it in hertz])


def chroma_of(waves):
    power, _ = Spectrogram(n_fft=1024, win_length=1024, hop_length=HOP, center=False)(waves)
    return Chroma(bins=513, sample_rate=RATE)(power)


def chord(*steps, tonic=0):
    """The pitch classes of a chord of sines above A and `tonic` semitones."""
    midi = 69 + tonic + torch.tensor(steps)
    return chroma_of(pitches(440 * 2 ** ((midi - 69) / 12)).sum(dim=0, keepdim=True))


def test_chroma_names_the_pitch_class_in_every_octave():
    midi = torch.arange(72, 96)
    classes = chroma_of(pitches(440 * 2 ** ((midi - 69) / 12)))
    assert torch.equal(classes.argmax(dim=-1), midi % 12)
    assert (classes.amax(dim=1) > 0.95).all()
    # an octave higher, the same picture; a semitone higher, turned by one
    torch.testing.assert_close(classes[:12], classes[12:], atol=0.15, rtol=0)
    turned = classes[1:] - classes[:-1].roll(1, dims=1)
    assert turned.abs().mean() < 0.03


def test_chroma_does_not_depend_on_loudness_and_silence_is_nothing():
    wave = pitches([523.25]) + 0.5 * pitches([659.26])
    torch.testing.assert_close(chroma_of(wave), chroma_of(0.03 * wave), atol=1e-3, rtol=0)
    assert (chroma_of(torch.zeros(1, RATE)) == 0).all()


def test_chroma_averages_over_the_frames_that_count():
    power = torch.rand(3, 513, 7)
    chroma = Chroma(bins=513, sample_rate=RATE)
    found = chroma(power, torch.tensor([7, 1, 4]))
    torch.testing.assert_close(found[0], chroma(power[:1])[0])
    torch.testing.assert_close(found[1], chroma(power[1:2, :, :1])[0])
    power[2, :, 4:] = float('nan')
    torch.testing.assert_close(found[2], chroma(power, torch.tensor([7, 1, 4]))[2])


def test_chroma_needs_bins_that_are_fine_enough():
    with pytest.raises(ValueError, match=r'bins of 250.0 Hz are too wide .* clip_summary=False'):
        Chroma(bins=33, sample_rate=16000)


# ---- tempogram ----


def clicks(bpm, seconds=6.0):
    """Short decaying noises on the beat, as a log-mel spectrogram `(1, mels, t)`."""
    torch.manual_seed(0)
    wave = torch.zeros(int(seconds * RATE))
    for beat in range(int(seconds * bpm / 60)):
        start = round(beat * 60 / bpm * RATE)
        length = min(800, len(wave) - start)
        wave[start : start + length] += torch.randn(length) * torch.linspace(1, 0, length) ** 2
    power, _ = Spectrogram(n_fft=1024, win_length=1024, hop_length=HOP)(0.1 * wave[None])
    return LogMel(40, bins=513, sample_rate=RATE, f_min=40.0, f_max=4000.0, mean=-4.0, std=4.0)(power)


@pytest.mark.parametrize('bpm', [72, 100, 150])
def test_tempogram_peaks_at_the_beat(bpm):
    found = tempogram(clicks(bpm), 60)[0]
    beat = 60 / bpm * RATE / HOP  # frames
    first = found[15:].argmax().item() + 16  # below 0.3 s a click is like itself
    assert first % beat < 2 or beat - first % beat < 2


def test_tempogram_equals_its_definition():
    torch.manual_seed(0)
    mel, lags = torch.randn(2, 7, 23), 30  # lags beyond the clip are 0
    onsets = (mel[..., 1:] - mel[..., :-1]).clamp(min=0).mean(dim=1)
    onsets = torch.cat([torch.zeros(2, 1), onsets], dim=1)
    onsets = onsets - onsets.mean(dim=1, keepdim=True)
    expected = torch.zeros(2, lags)
    for lag in range(1, 23):
        expected[:, lag - 1] = (onsets[:, lag:] * onsets[:, :-lag]).sum(dim=1) / onsets.square().sum(dim=1)
    torch.testing.assert_close(tempogram(mel, lags), expected, atol=1e-5, rtol=1e-4)


def test_tempogram_reads_the_frames_that_count():
    torch.manual_seed(0)
    mel = torch.randn(2, 7, 23)
    expected = tempogram(mel[1:, :, :15], 10)[0]
    mel[1, :, 15:] = 50.0
    found = tempogram(mel, 10, torch.tensor([23, 15]))
    torch.testing.assert_close(found[1], expected)
    torch.testing.assert_close(found[0], tempogram(mel, 10)[0])
    assert (tempogram(torch.full((1, 7, 20), -1.3), 10) == 0).all()


# ---- summary ----


def summary(dim=20):
    torch.manual_seed(0)
    return ClipSummary(dim, bins=513, sample_rate=RATE, hop_length=HOP)


def measured(items=5):
    """Pitch classes and tempograms, at random."""
    return torch.cat([torch.rand(items, PITCH_CLASSES), torch.rand(items, 100) - 0.5], dim=1)


def test_frames_too_close_for_a_tempogram_are_refused():
    with pytest.raises(ValueError, match='raise spec_hop_length to 32, or set clip_summary=False'):
        ClipSummary(20, bins=513, sample_rate=RATE, hop_length=12)


def test_harmony_is_the_same_in_every_key():
    module, given = summary(), measured()
    classes, rhythm = given[:, :PITCH_CLASSES], given[:, PITCH_CLASSES:]
    expected = module(given)
    for semitones in range(1, PITCH_CLASSES):
        turned = torch.cat([classes.roll(semitones, dims=1), rhythm], dim=1)
        torch.testing.assert_close(module(turned), expected)
    assert not torch.allclose(module(torch.cat([classes.flip(1), rhythm], dim=1)), expected, atol=1e-3)


def test_summary_equals_its_definition():
    module, given = summary(), measured()
    classes, rhythm = given[:, :PITCH_CLASSES], given[:, PITCH_CLASSES:]
    classes, rhythm = (
        (it - it.mean(dim=1, keepdim=True)) / (it.var(dim=1, keepdim=True, unbiased=False) + 1e-5).sqrt()
        for it in (classes, rhythm)
    )
    seen = torch.stack([module.from_each_tonic(classes.roll(-tonic, dims=1)) for tonic in range(PITCH_CLASSES)])
    expected = module.harmony_to_features(seen.amax(dim=0))
    expected = expected + module.rhythm_to_features(module.from_tempogram(rhythm))
    torch.testing.assert_close(module(given), expected)


def test_summary_learns_the_mode_in_one_key_and_tells_it_in_all_others():
    modes = {steps: torch.cat([chord(*steps, tonic=tonic) for tonic in range(12)]) for steps in ((0, 4, 7), (0, 3, 7))}
    given = F.pad(torch.stack(list(modes.values())), (0, 100))
    module = summary(dim=1)
    optimizer = torch.optim.Adam(module.parameters(), 1e-2)
    wanted = torch.tensor([[1.0], [-1.0]])
    for _ in range(60):
        loss = (module(given[:, 0]) - wanted).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    found = module(given[:, 1:].flatten(0, 1)).view(2, 11)
    assert torch.equal(found > 0, torch.tensor([[True], [False]]).expand(2, 11))


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float64])
def test_summary_follows_the_model_to_other_types(dtype):
    module, given = summary(), measured()
    expected = module(given)
    found = module.to(dtype)(given)
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), expected, atol=2e-2, rtol=2e-2)
