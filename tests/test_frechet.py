"""Distances between sets of embeddings: Fréchet against closed forms and scipy, its limit, and the kernel distance."""

import math
import pickle

import numpy as np
import pytest
import scipy.linalg
import torch

from musiclm_pytorch.evaluation import distances
from musiclm_pytorch.evaluation.distances import (
    NUM_GROUPS,
    FrameReservoir,
    GaussianStatistics,
    ThinnedStatistics,
    frechet_audio_distance,
    frechet_distance,
    frechet_infinity,
    kernel_audio_distance,
    kernel_distance,
    median_distance,
)


def rotation(dim, seed=0):
    return torch.linalg.qr(drawn(dim, dim, seed=seed))[0]


def drawn(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def statistics_of(frames):
    statistics = GaussianStatistics(frames.shape[1])
    statistics.update(frames)
    return statistics


def gaussian(mean, covariance):
    """Statistics that have exactly this mean and covariance: of points on both sides along its axes."""
    values, axes = torch.linalg.eigh(covariance)
    points = axes * (values.clamp(min=0) * (len(mean) - 0.5)).sqrt()
    return statistics_of(mean + torch.cat([points.T, -points.T]))


def filled(kind, clips, order=None, **keywords):
    """A `kind` that took clips of frames, in some order."""
    gathered = kind(clips[0].shape[1], **keywords)
    for clip in range(len(clips)) if order is None else order:
        gathered.update(clips[clip], clip)
    return gathered


# ---- statistics ----


@pytest.mark.parametrize('piece', [1, 300])
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64, torch.bfloat16])
def test_statistics_are_those_of_numpy(piece, dtype):
    frames = (drawn(1000, 5) * torch.tensor([1, 2, 0.1, 1, 3])).to(dtype)
    statistics = GaussianStatistics(5)
    for part in frames.split(piece):
        statistics.update(part)
    assert len(statistics) == 1000
    np.testing.assert_allclose(statistics.mean, frames.double().numpy().mean(axis=0), rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(statistics.covariance, np.cov(frames.double().numpy().T), rtol=1e-10, atol=1e-12)


def test_statistics_keep_their_digits_far_from_zero():
    frames = 1e7 + drawn(3000, 3)
    exact = np.cov((frames - 1e7).numpy().T)  # exact: the shift loses 1e-9 of each frame
    np.testing.assert_allclose(statistics_of(frames).covariance, exact, atol=1e-7)


def test_merged_statistics_are_those_of_all_frames():
    frames = drawn(900, 4) + 3
    whole, parts = statistics_of(frames), [statistics_of(part) for part in frames.split([1, 500, 399])]
    merged = GaussianStatistics(4)
    for part in [GaussianStatistics(4), *parts]:
        merged.merge(pickle.loads(pickle.dumps(part)))
    assert len(merged) == 900
    assert len(parts[1]) == 500
    torch.testing.assert_close(merged.mean, whole.mean, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(merged.covariance, whole.covariance, rtol=1e-12, atol=1e-12)
    merged.update(frames)
    torch.testing.assert_close(merged.covariance, torch.cat([frames, frames]).T.cov(), rtol=1e-12, atol=1e-12)


def test_statistics_share_no_memory_with_anyone():
    frames = drawn(3, 2)
    statistics = statistics_of(frames)
    wanted = statistics.mean, statistics.covariance
    for tensor in (frames, statistics.mean, statistics.covariance):
        tensor.fill_(9)
    for found, was in zip((statistics.mean, statistics.covariance), wanted):
        torch.testing.assert_close(found, was)


def test_what_ranks_send_is_no_more_than_it_must_be():
    thinned, reservoir = ThinnedStatistics(64), FrameReservoir(64, max_frames=100)
    for clip in range(40):
        thinned.update(drawn(40, 64, seed=clip), clip)
        reservoir.update(drawn(40, 64, seed=clip), clip)
    # of each group a scatter and a mean, of each frame its number, clip and values
    assert len(pickle.dumps(thinned)) < 1.05 * NUM_GROUPS * 8 * 64 * 65
    assert len(pickle.dumps(reservoir)) < 1.2 * 100 * (8 + 8 + 4 * 64)
    torch.testing.assert_close(pickle.loads(pickle.dumps(thinned)).total().covariance, thinned.total().covariance)


def test_closed_forms():
    zero, one = torch.zeros(3, dtype=torch.float64), torch.eye(3, dtype=torch.float64)
    shift = torch.tensor([1.0, -2, 2], dtype=torch.float64)
    assert frechet_distance(gaussian(zero, one), gaussian(zero, one)) == pytest.approx(0, abs=1e-12)
    assert frechet_distance(gaussian(zero, one), gaussian(shift, one)) == pytest.approx(9)
    assert frechet_distance(gaussian(zero, one), gaussian(zero, 9 * one)) == pytest.approx(3 * (3 - 1) ** 2)

    # covariances that commute: the sum of (σa - σb)² along their common axes
    a, b = torch.tensor([1.0, 4, 0], dtype=torch.float64), torch.tensor([9.0, 4, 2], dtype=torch.float64)
    wanted = (a.sqrt() - b.sqrt()).square().sum().item()
    axes = rotation(3)
    for basis in (one, axes):
        sides = [gaussian(mean, basis @ values.diag() @ basis.T) for mean, values in ((zero, a), (shift, b))]
        assert frechet_distance(*sides) == pytest.approx(wanted + 9)

    # in two dimensions Tr (AB)^½ = √(Tr AB + 2 √det AB), whatever the axes
    turn, a, b = rotation(2, seed=1), torch.tensor([5.0, 0.5]).double().diag(), torch.tensor([3.0, 2]).double().diag()
    b = turn @ b @ turn.T
    root = math.sqrt((a @ b).trace() + 2 * math.sqrt((a @ b).det()))
    found = frechet_distance(gaussian(zero[:2], a), gaussian(shift[:2], b))
    assert found == pytest.approx(5 + (a + b).trace().item() - 2 * root)


# ---- the Fréchet distance ----


@pytest.mark.parametrize('dim', [1, 2, 64])
def test_agrees_with_scipy(dim):
    a, b = drawn(300, dim) @ drawn(dim, dim, seed=1), drawn(200, dim, seed=2) @ drawn(dim, dim, seed=3) + 0.5
    cov_a, cov_b = (np.atleast_2d(np.cov(frames.numpy().T)) for frames in (a, b))
    root = np.trace(scipy.linalg.sqrtm(cov_a @ cov_b)).real
    wanted = (a.mean(0) - b.mean(0)).square().sum().item() + np.trace(cov_a) + np.trace(cov_b) - 2 * root
    assert frechet_distance(statistics_of(a), statistics_of(b)) == pytest.approx(wanted, rel=1e-9)
    assert frechet_distance(statistics_of(b), statistics_of(a)) == pytest.approx(wanted, rel=1e-9)


@pytest.mark.parametrize('frames', [(2, 3), (10, 30), (30, 100)])
def test_fewer_frames_than_dimensions(frames):
    a, b = (drawn(n, 40, seed=n) for n in frames)
    # the roots of the eigenvalues of Σa Σb are the singular values of the centred frames against each other
    centred = [(it - it.mean(0)).numpy() / math.sqrt(len(it) - 1) for it in (a, b)]
    root = np.linalg.svd(centred[0] @ centred[1].T, compute_uv=False).sum()
    squares = sum(np.square(it).sum() for it in centred)
    wanted = (a.mean(0) - b.mean(0)).square().sum().item() + squares - 2 * root
    assert frechet_distance(statistics_of(a), statistics_of(b)) == pytest.approx(wanted, rel=1e-6)
    assert frechet_distance(statistics_of(a), statistics_of(a)) == pytest.approx(0, abs=1e-6)


# ---- its limit ----


def clips_of(count, frames, dim, seed=0):
    """Clips whose frames resemble each other, from one Gaussian of covariance 1."""
    own, shared = drawn(count, frames, dim, seed=seed), drawn(count, 1, dim, seed=seed + 10_000)
    return list(math.sqrt(0.5) * (own + shared))


def test_thinned_statistics_do_not_depend_on_order_or_ranks():
    clips = clips_of(150, 3, 4)
    whole = filled(ThinnedStatistics, clips, seed=5)
    order = np.random.default_rng(0).permutation(150).tolist()
    shuffled = filled(ThinnedStatistics, clips, order, seed=5)
    joined = ThinnedStatistics(4, seed=5)
    for rank in range(3):
        part = filled(ThinnedStatistics, clips, range(rank, 150, 3), seed=5)
        joined.merge(pickle.loads(pickle.dumps(part)))
    reference, plain = statistics_of(drawn(999, 4)), statistics_of(torch.cat(clips))
    wanted = frechet_infinity(reference, whole, embedding='clap')
    for other in (shuffled, joined):
        assert len(other) == 450
        torch.testing.assert_close(other.total().covariance, plain.covariance, rtol=1e-12, atol=1e-12)
        assert frechet_infinity(reference, other).value == pytest.approx(wanted.value, rel=1e-9)
    assert frechet_infinity(reference, filled(ThinnedStatistics, clips, seed=6)).value != wanted.value
    details = dict(wanted.details)
    assert 90 <= details.pop('smallest_subset') <= 150
    assert details.pop('slope') > 0
    assert 0 < details.pop('r_squared') <= 1
    assert details == dict(embedding='clap', frames=(999, 450), seed=5)


@pytest.mark.parametrize(('clips', 'dim', 'share'), [(1000, 4, 1 / 4), (300, 100, 1 / 3), (200, 100, 1 / 2)])
def test_subsets_are_large_enough_and_end_with_everything(clips, dim, share):
    thinned = filled(ThinnedStatistics, clips_of(clips, 1, dim))
    sizes = [np.mean([len(subset) for subset in subsets]) for subsets in thinned.subsets()]
    assert len(sizes) >= 5
    assert np.corrcoef(1 / np.array(sizes), np.arange(len(sizes)))[0, 1] < -0.97  # evenly spread in 1/size
    assert sizes[0] == pytest.approx(clips * share, rel=0.15)
    assert sizes[-1] == clips
    assert len(list(thinned.subsets())[-1]) == 1


@pytest.mark.parametrize(('count', 'frames', 'dim'), [(300, 1, 32), (100, 8, 16)])
def test_limit_is_much_less_biased_than_the_distance(count, frames, dim):
    mean = torch.full((dim,), 0.2, dtype=torch.float64)
    reference = gaussian(torch.zeros(dim, dtype=torch.float64), 1.5 * torch.eye(dim, dtype=torch.float64))
    true = dim * (0.2**2 + (math.sqrt(1.5) - 1) ** 2)
    plain, limit, fits = [], [], []
    for seed in range(6):
        clips = [clip + mean for clip in clips_of(count, frames, dim, seed=seed)]
        thinned = filled(ThinnedStatistics, clips, seed=seed)
        found = frechet_infinity(reference, thinned)
        plain.append(frechet_distance(reference, thinned.total()))
        limit.append(found.value)
        fits.append(found.details['r_squared'])
    assert np.mean(plain) - true > 0.2 * true
    assert abs(np.mean(limit) - true) < 0.3 * (np.mean(plain) - true)
    assert np.mean(fits) > 0.9


def test_distance_of_too_few_clips_is_undefined():
    a, b = statistics_of(drawn(50, 3)), statistics_of(drawn(60, 3, seed=1))
    found = frechet_audio_distance(a, b, embedding='mulan')
    assert (found.value, found.details) == (frechet_distance(a, b), dict(embedding='mulan', frames=(50, 60)))
    found = frechet_audio_distance(a, statistics_of(drawn(1, 3)))
    assert (found.value, found.details['frames']) == (None, (50, 1))
    assert 'got 50 of reference and 1 generated' in found.reason
    reference = statistics_of(drawn(999, 40))
    for clips, says in (
        (clips_of(10, 100, 40), 'got 1000 frames'),
        (clips_of(79, 1, 40), '80 frames, twice their width, got 79 frames'),
        (clips_of(1, 1, 40), '999 of reference and 1 generated'),
    ):
        found = frechet_infinity(reference, filled(ThinnedStatistics, clips))
        assert found.value is None
        assert says in found.reason
    assert frechet_infinity(reference, filled(ThinnedStatistics, clips_of(80, 1, 40))).value is not None
    assert frechet_infinity(GaussianStatistics(40), filled(ThinnedStatistics, clips_of(99, 9, 40))).value is None


# ---- the kernel distance ----


def plain_kernel_distance(x, y, bandwidth, x_clips, y_clips):
    """The definition, pair by pair; within a set only of frames of different clips."""

    def k(a, b):
        return math.exp(-((a - b) ** 2).sum() / (2 * bandwidth**2))

    x, y, within = x.double().numpy(), y.double().numpy(), []
    for it, clips in ((x, x_clips), (y, y_clips)):
        within.append(np.mean([k(a, b) for a, i in zip(it, clips) for b, j in zip(it, clips) if i != j]))
    return 100 * (sum(within) - 2 * np.mean([k(a, b) for a in x for b in y]))


def plain_median_distance(x, clips):
    pairs = [(x[i] - x[j]).double().norm().item() for i in range(len(x)) for j in range(i) if clips[i] != clips[j]]
    return sorted(pairs)[(len(pairs) - 1) // 2]


@pytest.mark.parametrize(('m', 'n', 'dim'), [(2, 2, 1), (13, 11, 3), (31, 40, 16)])
@pytest.mark.parametrize('rows', [512, 4])
def test_kernel_distance_is_its_definition_over_frames_of_different_clips(monkeypatch, m, n, dim, rows):
    monkeypatch.setattr(distances, 'ROWS', rows)
    x, y = drawn(m, dim).float() + 50, drawn(n, dim, seed=1).float() * 1.5 + 50.3
    for x_clips, y_clips in ((torch.arange(m), torch.arange(n)), (torch.arange(m) % 5, torch.arange(n) // 2 % 4)):
        if len(x_clips.unique()) < 2 or len(y_clips.unique()) < 2:
            continue
        bandwidth = plain_median_distance(x, x_clips)
        assert median_distance(x, x_clips) == pytest.approx(bandwidth)
        for width in (bandwidth, 0.7):
            wanted = plain_kernel_distance(x, y, width, x_clips, y_clips)
            found = kernel_distance(x, y, width, reference_clips=x_clips, generated_clips=y_clips)
            assert found == pytest.approx(wanted, rel=1e-6, abs=1e-8)


def test_bandwidth_of_many_frames_is_near_that_of_all(monkeypatch):
    frames = drawn(600, 3) + torch.linspace(0, 3, 600)[:, None]
    apart = torch.arange(600)
    whole = median_distance(frames, apart)
    monkeypatch.setattr(distances, 'MEDIAN_FRAMES', 150)
    assert whole != median_distance(frames, apart) == pytest.approx(whole, rel=0.05)
    # one frame of another clip among many is always there
    clips = torch.zeros(600, dtype=torch.long).index_fill(0, torch.tensor([333]), 1)
    assert median_distance(frames, clips) == pytest.approx((frames - frames[333]).norm(dim=1).median().item(), rel=0.1)


@pytest.mark.parametrize('count', [5, 20])
def test_kernel_distance_knows_no_number_of_clips(count):
    # ten frames a clip that hardly differ, as MuLaN's windows: sets of one kind are at a distance of 0
    values = []
    for seed in range(60):
        sides = []
        for side in range(2):
            own = drawn(count, 1, 8, seed=2 * seed + side)
            clips = list(own + 0.05 * drawn(count, 10, 8, seed=10_000 + 2 * seed + side))
            sides.append(filled(FrameReservoir, clips, max_frames=10 * count - 7))
        values.append(kernel_audio_distance(*sides).value)
    assert abs(np.mean(values)) < min(2, 3.5 * np.std(values) / math.sqrt(60))
    assert min(values) < 0
    apart = filled(FrameReservoir, [clip + 1 for clip in clips])
    assert kernel_audio_distance(sides[0], apart).value > 10


def test_reservoir_does_not_depend_on_order_or_ranks():
    clips = [drawn(1 + clip % 5, 3, seed=clip).float() for clip in range(200)]
    whole = filled(FrameReservoir, clips, max_frames=50, seed=2)
    assert len(whole) == 600
    assert whole.frames.shape == (50, 3)
    assert len(whole.frames.unique(dim=0)) == 50
    everything = {tuple(frame.tolist()) for frame in torch.cat(clips)}
    assert all(tuple(frame.tolist()) in everything for frame in whole.frames)

    order = np.random.default_rng(0).permutation(200).tolist()
    joined = FrameReservoir(3, 50, seed=2)
    for rank in range(3):
        part = filled(FrameReservoir, clips, range(rank, 200, 3), max_frames=50, seed=2)
        joined.merge(pickle.loads(pickle.dumps(part)))
    for other in (filled(FrameReservoir, clips, order, max_frames=50, seed=2), joined):
        assert len(other) == 600
        assert torch.equal(other.frames, whole.frames)
        assert torch.equal(other.clips, whole.clips)
    for frame, clip in zip(whole.frames, whole.clips.tolist()):
        assert (clips[clip] == frame).all(dim=1).any()
    assert not torch.equal(filled(FrameReservoir, clips, max_frames=50, seed=3).frames, whole.frames)


def test_reservoir_is_a_fair_sample():
    clips = [torch.arange(4.0)[:, None] + 4 * clip for clip in range(10)]
    chosen = torch.zeros(40)
    for seed in range(200):
        chosen[filled(FrameReservoir, clips, max_frames=8, seed=seed).frames.flatten().long()] += 1
    # 40 expected each, with a deviation of 6
    assert chosen.sum() == 200 * 8
    assert 15 < chosen.min() <= chosen.max() < 65


def test_reservoir_keeps_everything_that_fits_and_little_more():
    clips = clips_of(30, 3, 2)
    assert len(filled(FrameReservoir, clips, max_frames=90).frames) == 90
    reservoir = FrameReservoir(2, 10)
    for clip in range(1000):
        reservoir.update(drawn(7, 2, seed=clip), clip)
        assert len(pickle.dumps(reservoir)) < 3000


def test_kernel_figure():
    clips, others = clips_of(100, 3, 4), clips_of(50, 3, 4, seed=1)
    x, y = filled(FrameReservoir, clips, max_frames=90), filled(FrameReservoir, others, max_frames=90)
    found = kernel_audio_distance(x, y, embedding='clap')
    details = dict(found.details)
    bandwidth = details.pop('bandwidth')
    assert bandwidth == median_distance(x.frames, x.clips)
    clips = dict(reference_clips=x.clips, generated_clips=y.clips)
    assert found.value == kernel_distance(x.frames, y.frames, bandwidth, **clips)
    assert details == dict(
        embedding='clap',
        frames=(300, 150),
        sampled=(90, 90),
        clips=(len(set(x.clips.tolist())), len(set(y.clips.tolist()))),
        seed=0,
    )
    few = filled(FrameReservoir, [drawn(9, 4)])
    assert '2 clips on each side, got ' in kernel_audio_distance(x, few).reason
    assert 'got 1 of reference and ' in kernel_audio_distance(few, x).reason
    alike = filled(FrameReservoir, [torch.full((5, 4), 0.1)] * 3)
    assert 'alike' in kernel_audio_distance(alike, x).reason
    assert kernel_audio_distance(x, alike).value > 0


# ---- bad input ----


@pytest.mark.parametrize(
    ('error', 'says', 'call'),
    [
        (ValueError, r'shape \(n, 3\), got \(5, 4\)', lambda: GaussianStatistics(3).update(drawn(5, 4))),
        (ValueError, r'shape \(n, 3\), got \(3,\)', lambda: GaussianStatistics(3).update(drawn(3))),
        (ValueError, 'NaN or infinity', lambda: GaussianStatistics(1).update(torch.tensor([[1.0], [math.nan]]))),
        (ValueError, 'NaN or infinity', lambda: FrameReservoir(1).update(torch.tensor([[math.inf]]), 0)),
        (TypeError, 'floats, got torch.int64', lambda: GaussianStatistics(1).update(torch.tensor([[1]]))),
        (ValueError, 'dim must be greater than 0, got 0', lambda: GaussianStatistics(0)),
        (ValueError, 'no frame', lambda: GaussianStatistics(2).mean),
        (ValueError, 'at least 2 frames, got 1', lambda: statistics_of(drawn(1, 2)).covariance),
        (ValueError, '4-d frames into those of 3-d', lambda: GaussianStatistics(3).merge(GaussianStatistics(4))),
        (ValueError, 'widths 3 and 4', lambda: frechet_distance(GaussianStatistics(3), GaussianStatistics(4))),
        (ValueError, 'widths 3 and 4', lambda: frechet_audio_distance(GaussianStatistics(3), GaussianStatistics(4))),
        (ValueError, 'widths 3 and 4', lambda: frechet_infinity(GaussianStatistics(3), ThinnedStatistics(4))),
        (ValueError, 'widths 3 and 4', lambda: kernel_audio_distance(FrameReservoir(3), FrameReservoir(4))),
        (ValueError, 'seed 1 into', lambda: ThinnedStatistics(3).merge(ThinnedStatistics(3, 1))),
        (ValueError, 'clip must be at least 0, got -1', lambda: ThinnedStatistics(3).update(drawn(2, 3), -1)),
        (ValueError, 'seed must be at least 0, got -1', lambda: FrameReservoir(3, seed=-1)),
        (ValueError, 'can be merged', lambda: FrameReservoir(3, 5).merge(FrameReservoir(3, 6))),
    ],
)  # fmt: skip
def test_bad_input_is_named(error, says, call):
    with pytest.raises(error, match=says):
        call()
