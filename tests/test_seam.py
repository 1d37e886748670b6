"""Given samples stay as they are, and what was made goes on from them as loud."""

import math

import pytest
import torch

from musiclm_pytorch.audiolm.pieces import join

RATE, KNOWN, FADE = 1000, 2000, 40


def decibels(wave):
    return 10 * wave.square().mean(dim=-1).log10()


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    # how soft the given samples are, how loud what was made is, how soft the given samples end; and the step in dB
    ('soft', 'gain', 'end', 'step'),
    [(1, 1, 1, 0.0), (1, 0.6, 1, 0.0), (0.1, 1, 1, 0.0), (1, 0.2, 1, 0.0), (1, 1, 0.5, 0.0), (1, 1, 0.01, 31.0)],
)
def test_goes_on_as_loud(soft, gain, end, step):
    given, made = 0.1 * soft * noise(KNOWN), 0.1 * gain * noise(2, 3, 5000, seed=1)
    given[KNOWN - RATE :] *= end
    joined = join(given, made, RATE)
    assert joined.shape == made.shape
    assert torch.equal(joined[..., : KNOWN - FADE], given[: KNOWN - FADE].expand(2, 3, -1))
    # one gain for all that was made
    ratio = joined[..., KNOWN:] / made[..., KNOWN:]
    torch.testing.assert_close(ratio, ratio[..., :1].expand_as(ratio))
    found = decibels(joined[..., KNOWN : KNOWN + RATE]) - decibels(given[KNOWN - RATE :])
    torch.testing.assert_close(found, torch.full((2, 3), step), atol=0.8, rtol=0)
    # the powers add up, without a dip
    middle = decibels(joined[..., KNOWN - FADE : KNOWN].flatten()) - decibels(given[KNOWN - RATE :])
    assert float(middle) == pytest.approx(10 * math.log10((1 + 10 ** (step / 10)) / 2), abs=1.5)


def test_a_longer_crossfade_and_the_own_loudness_after_a_while():
    given, made = 0.1 * noise(KNOWN), 0.05 * noise(2, 7000, seed=1)
    joined = join(given, made, RATE, fade=0.3, settle=2.0)
    assert torch.equal(joined[:, : KNOWN - 300], given[: KNOWN - 300].expand(2, -1))
    # equal power in the middle of it, as loud from the seam on, and as it was made two seconds later
    parts = torch.stack([decibels(joined[:, i : i + 100]) for i in (KNOWN - 200, KNOWN)]) - decibels(given)
    assert parts.abs().max() < 1.5
    gain = (joined / made)[:, KNOWN:]
    assert (gain[:, 0] > 1.8).all()
    assert (gain[:, 1:2000] <= gain[:, :1999] + 1e-5).all()
    torch.testing.assert_close(joined[:, KNOWN + 2000 :], made[:, KNOWN + 2000 :])


def test_silence_and_full_scale_set_no_level():
    given, made = 0.1 * noise(KNOWN), 0.1 * noise(5000, seed=1)
    for first, second in ((torch.zeros(KNOWN), made), (given, torch.zeros(5000))):
        assert torch.equal(join(first, second, RATE)[KNOWN:], second[KNOWN:])
    loud = noise(5000).sign() * 0.8
    assert join(noise(KNOWN, seed=2).sign(), loud, RATE)[KNOWN:].abs().max() <= 1 + 1e-6


@pytest.mark.parametrize(('known', 'length'), [(10, 5000), (KNOWN, KNOWN), (KNOWN + 1, KNOWN), (KNOWN - 1, KNOWN)])
def test_short_ones_and_ends(known, length):
    given, made = 0.1 * noise(known), 0.1 * noise(2, length, seed=1)
    joined = join(given, made, RATE)
    assert joined.shape == made.shape
    exact = length if known >= length else max(0, known - FADE)
    assert torch.equal(joined[:, :exact], given[:exact].expand(2, -1))
