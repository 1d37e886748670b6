"""Where a data set meets a model, the rates that both know are compared: waves are resampled, or refused."""

import pytest
import torch
from helpers.models import tiny_mulan
from helpers.notes import notes
from torch.utils.data import ConcatDataset, Subset

from musiclm_pytorch import MuLaNEmbedQuantizer, MuLaNSemanticTokenizer, MuLaNTrainer, SyntheticMusic
from musiclm_pytorch.audiolm.spectral_codec import SpectralCodec
from musiclm_pytorch.audiolm.tokens import compute_tokens
from musiclm_pytorch.data import write_shards
from musiclm_pytorch.data.audio import resample
from musiclm_pytorch.data.rates import agreed_rate, rate_of

RATE = 4000  # of the models, in Hz


class Pairs(list):
    """Waves at twice the rate of the models, which they tell, each with ids of its own."""

    def __init__(self, waves, sample_rate=2 * RATE):
        super().__init__((wave, torch.tensor([1 + i])) for i, wave in enumerate(waves))
        self.sample_rate = sample_rate


@pytest.fixture(scope='module')
def pairs():
    return Pairs(torch.nn.functional.interpolate(notes(12)[None], scale_factor=2, mode='linear')[0])


def mulan():
    torch.manual_seed(0)
    return tiny_mulan(dict(depth=1, audio_sample_rate=RATE), dict(depth=1)).eval()


def quantizer():
    return MuLaNEmbedQuantizer(mulan(), conditioning_dims=(8,), namespaces=('semantic',), codebook_size=4)


def tokenizer():
    return MuLaNSemanticTokenizer(mulan(), codebook_size=4)


def codec():
    return SpectralCodec(RATE, codebook_size=8, window=0.064, hop=0.016, bands=16, resolved_hz=800, components=8)


@pytest.mark.parametrize('build', [quantizer, tokenizer, codec])
def test_fitting_hears_the_waves_at_the_rate_of_the_model(build, pairs):
    own = [(resample(wave, 2 * RATE, RATE), ids) for wave, ids in pairs]  # a list tells no rate
    states = []
    for data in (pairs, Subset(pairs, range(len(pairs))), own):
        model = build()
        model.fit(data)
        states.append(model.state_dict())
    for state in states[1:]:
        for name, tensor in state.items():
            torch.testing.assert_close(tensor, states[0][name], atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize('name', ['dataset', 'valid_dataset'])
def test_training_refuses_another_rate(name, pairs, tmp_path):
    fitting = Pairs([wave[::2] for wave, _ in pairs], RATE)
    settings = dict(batch_size=4, num_train_steps=1, results_folder=tmp_path / 'run')
    for other in (pairs, Subset(pairs, range(9))):
        data = dict(dataset=fitting, valid_dataset=fitting) | {name: other}
        with pytest.raises(ValueError, match=f'^{name} gives waves at 8000 Hz, but the model hears 4000 Hz; open the'):
            MuLaNTrainer(mulan(), **data, **settings)
    assert not (tmp_path / 'run').exists()
    MuLaNTrainer(mulan(), fitting, valid_dataset=list(pairs), **settings)  # a list tells no rate
    MuLaNTrainer(tiny_mulan(dict(depth=1), dict(depth=1)), pairs, **settings)  # nor does this model


def test_what_a_call_says_is_compared_with_what_the_data_tell(pairs, tmp_path):
    says = 'the data set gives waves at 8000 Hz, but sample_rate=4000; leave sample_rate out'
    for call in (
        lambda: tokenizer().fit(pairs, sample_rate=RATE),
        lambda: codec().fit(pairs, sample_rate=RATE),
        lambda: compute_tokens(pairs, tmp_path, codec=codec(), sample_rate=RATE),
        lambda: write_shards(pairs, tmp_path, sample_rate=RATE),
    ):
        with pytest.raises(ValueError, match=says):
            call()
    assert not list(tmp_path.iterdir())


def test_what_data_sets_tell(pairs):
    music = SyntheticMusic(2, seconds=1.0, sample_rate=16000)
    assert rate_of(Subset(Subset(music, [0]), [0])) == 16000
    assert rate_of(ConcatDataset([music, [1]])) == 16000
    assert rate_of([1]) is None
    assert agreed_rate([1], None, default=9) == 9
    with pytest.raises(ValueError, match='joins waves at 8000 Hz and 16000 Hz'):
        rate_of(ConcatDataset([music, pairs]))
    with pytest.raises(ValueError, match='a list does not tell its sample rate; pass sample_rate'):
        agreed_rate([1], None)
