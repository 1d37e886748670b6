"""What a notebook shows of an object: a few lines, with sizes and what it knows."""

import pytest
import torch
from helpers.sounds import ramp, write
from torch import nn

import musiclm_pytorch
from musiclm_pytorch import (
    AudioTextDataset,
    BatchInferenceEngine,
    MuLaNIndex,
    MuLaNTrainer,
    MusicLM,
    MusicLMEvaluator,
    OptimizedMuLaN,
    SyntheticMusic,
)
from musiclm_pytorch.inference import InferenceConfig
from musiclm_pytorch.mulan.display import size_of


@pytest.fixture(scope='module')
def shown(tmp_path_factory):
    """An object of each kind, by the name of its class."""
    folder = tmp_path_factory.mktemp('shown')
    for index in range(2):
        write(folder / 'music' / f'{index}.wav', ramp(1), caption=f'clip {index}')
    musiclm = MusicLM.from_pretrained('tiny')
    mulan = musiclm.mulan_embed_quantizer.mulan
    trainer = MuLaNTrainer(
        mulan, SyntheticMusic(4, seconds=1.0, sample_rate=8000), batch_size=2, results_folder=folder / 'run'
    )
    found = [
        *(musiclm, musiclm.mulan_embed_quantizer, mulan, musiclm.tokenizer, musiclm.codec),
        musiclm('a flute', 2, seconds=0.2, seed=7, return_scores=True),
        *(SyntheticMusic(9), AudioTextDataset.from_folder(folder / 'music', sample_rate=8000)),
        *(trainer, MuLaNIndex(mulan), BatchInferenceEngine(musiclm), MusicLMEvaluator(mulan)),
        OptimizedMuLaN(mulan, InferenceConfig(device='cpu', compile_model=False, use_mixed_precision=False)),
    ]
    return {type(it).__name__: repr(it) for it in found}


KNOWN = {
    'MusicLM': ['16000 Hz', 'cond_scale', 'coarse ', '(5 s)', 'MuLaN('],
    'MuLaNEmbedQuantizer': ['fitted, 8 levels of 128 codes', 'coarse 192', 'MuLaN('],
    'MuLaN': ['float32 weights on cpu', 'latents of 128', '8000 Hz', '49408 tokens, 204 of them known'],
    'MuLaNSemanticTokenizer': ['fitted', 'tokens', 'a second at 8000 Hz'],
    'SpectralCodec': ['8 levels of 512 codes', '25 frames a second at 16000 Hz'],
    'Music': ['(1, 3200)', '(1, 2)', '[[7, 8]]'],
    'SyntheticMusic': ['SyntheticMusic(9, '],
    'AudioTextDataset': ['2 clips of', 'music', '8000 Hz'],
    'MuLaNTrainer': ['step 0', 'batches of 2 × 1', 'run', 'weights on cpu'],
    'MuLaNIndex': ['0 clips', 'latents of 128', 'with its MuLaN'],
    'BatchInferenceEngine': ['16 items a batch', 'MusicLM('],
    'MusicLMEvaluator': ['seed=0', 'MuLaN('],
    'OptimizedMuLaN': ['float32', 'at a time', 'MuLaN('],
}


@pytest.mark.parametrize('name', KNOWN)
def test_it_is_short_and_tells_what_it_knows(shown, name):
    text = shown[name]
    assert text.startswith(f'{name}(')
    assert text.endswith(')')
    assert len(text.splitlines()) <= 9
    assert max(map(len, text.splitlines())) <= 160
    assert [it for it in KNOWN[name] if it not in text] == []


def test_sizes():
    assert size_of(nn.Linear(2, 3)) == '9 float32 weights on cpu'
    assert size_of(nn.Linear(1000, 1234, bias=False, dtype=torch.bfloat16)) == '1.23M bfloat16 weights on cpu'
    assert size_of(nn.BatchNorm1d(2, affine=False)) == '5 float32 weights on cpu'  # buffers, where nothing else is


def test_no_public_class_prints_all_of_its_layers():
    """What has layers says itself how it is shown; a tower or a stage alone is there to be looked into."""
    classes = [it for name in musiclm_pytorch.__all__ if isinstance(it := getattr(musiclm_pytorch, name), type)]
    layered = {it.__name__ for it in classes if issubclass(it, nn.Module) and it.__repr__ is nn.Module.__repr__}
    assert layered == {
        *('AudioSpectrogramTransformer', 'TextTransformer', 'MelodyEncoder', 'MuLaNOpenCLIP'),
        *('PretrainedAudioTransformer', 'PretrainedTextTransformer'),
        *('SemanticTransformer', 'CoarseTransformer', 'FineTransformer'),
        *('MultiLayerContrastiveLoss', 'SigmoidContrastiveLearning', 'SoftmaxContrastiveLearning'),
    }
