"""The centres of semantic tokens: plain k-means on normalised frames, learned from a stream."""

import pytest
import torch

from musiclm_pytorch.audiolm.kmeans import KMeansCodebook


def clusters(n=400, dim=5, codes=4, seed=0):
    """Frames around far-apart centres, in features of very different scale and offset, and where each belongs."""
    generator = torch.Generator().manual_seed(seed)
    centers = torch.randn(codes, dim, generator=torch.Generator().manual_seed(9)) * 20
    which = torch.randint(codes, (n,), generator=generator)
    frames = centers[which] + 0.3 * torch.randn(n, dim, generator=generator)
    return frames * torch.logspace(-2, 3, dim) + 50 * torch.arange(dim), which


def same_partition(one, other):
    return len({*zip(one.tolist(), other.tolist())}) == len(one.unique()) == len(other.unique())


@pytest.mark.parametrize('shape', [(7,), (3, 11), (2, 3, 4)])
def test_the_nearest_centre_is_that_of_brute_force(shape):
    codebook = KMeansCodebook(12, 30)
    mean, std = torch.randn(12) * 5, torch.rand(12) + 0.1
    codebook.set(torch.randn(30, 12), mean, std)
    features = torch.randn(*shape, 12) * std + mean
    distances = (((features - mean) / std)[..., None, :] - codebook.centers).double().square().sum(dim=-1)
    assert torch.equal(codebook(features), distances.argmin(dim=-1))
    assert torch.equal(codebook(features.double()), codebook(features))


def test_clusters_are_found_in_a_stream_of_uneven_blocks():
    frames, which = clusters()
    whole, pieces = KMeansCodebook(5, 4), KMeansCodebook(5, 4)
    lost = whole.fit([frames], max_frames=1000, seed=3)
    assert lost < 1e-3
    assert same_partition(whole(frames), which)
    new, where = clusters(seed=1)
    assert same_partition(whole(new), where)

    assert pieces.fit(frames.split([1, 7, 200, 0, 192]), max_frames=1000, seed=3) == pytest.approx(lost, rel=1e-4)
    torch.testing.assert_close(pieces.mean, frames.double().mean(dim=0).float())
    torch.testing.assert_close(pieces.std, frames.double().std(dim=0, correction=0).float())
    torch.testing.assert_close(pieces.centers, whole.centers, atol=1e-4, rtol=1e-4)


def test_no_more_frames_are_kept_than_allowed_and_those_are_drawn_from_all():
    # the stream begins with one cluster alone: a k-means over its beginning would not find the others
    frames, which = clusters(n=3000)
    order = which.argsort()
    codebook = KMeansCodebook(5, 4)
    codebook.fit(frames[order].split(100), max_frames=150, seed=0)
    assert same_partition(codebook(frames), which)
    torch.testing.assert_close(codebook.mean, frames.double().mean(dim=0).float())  # of all, not of those kept


def test_a_feature_that_never_changes_does_no_harm():
    frames, which = clusters()
    frames[:, 2] = 1234.5
    codebook = KMeansCodebook(5, 4)
    codebook.fit(frames.split(50), max_frames=1000, seed=0)
    assert codebook.std[2] == 1
    assert codebook.centers.isfinite().all()
    assert same_partition(codebook(frames), which)


@pytest.mark.parametrize(
    ('frames', 'keywords', 'says'),
    [
        (torch.randn(3, 5), {}, '4 centres need at least as many different frames, got 3 in 3'),
        (torch.randn(3, 5).repeat(9, 1), {}, 'got 3 in 27'),
        (torch.full((9, 5), torch.inf), {}, 'NaN or infinity'),
        (torch.randn(9, 5), dict(max_frames=3), 'max_frames 3 is less than codebook_size 4'),
        (torch.randn(9, 5), dict(max_frames=0), 'max_frames must be greater than 0'),
    ],
)
def test_frames_that_give_no_centres(frames, keywords, says):
    codebook = KMeansCodebook(5, 4)
    with pytest.raises(ValueError, match=says):
        codebook.fit([frames], **dict(max_frames=100, seed=0) | keywords)
    assert not codebook.is_fitted


def test_centres_of_a_wrong_shape_and_sizes_below_one():
    with pytest.raises(ValueError, match=r'must have shape \(4, 5\), got \(5, 4\)'):
        KMeansCodebook(5, 4).set(torch.randn(5, 4))
    with pytest.raises(ValueError, match='codebook_size'):
        KMeansCodebook(5, 0)
