"""Models by their name on the Hugging Face Hub: offline, from a cache that the tests fill as huggingface_hub does."""

import json
import shutil

import huggingface_hub
import pytest
import torch
from helpers.clap import tiny_clap
from helpers.pretrained_parts import make_codec_model
from helpers.stage_parts import make_quantizer
from helpers.training import assert_same

from musiclm_pytorch import (
    MuLaN,
    MuLaNEmbedQuantizer,
    MusicLM,
    NeuralCodec,
    PretrainedCodec,
    PretrainedMuLaN,
    SpectralCodec,
    TransformersSemanticTokenizer,
)
from musiclm_pytorch.evaluation import CLAPEmbedder, load_mulan
from musiclm_pytorch.mulan.pretrained import load_joint
from musiclm_pytorch.pretrained import HOME
from musiclm_pytorch.pretrained.hub import HubModel, load_processor, load_transformers
from musiclm_pytorch.trainer.assembly import load_codec

COMMIT = {'main': 'a' * 40, 'v1': 'b' * 40}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A function that puts a folder into the cache as a repository's; uploads of huggingface_hub go there, too."""
    cache = tmp_path / 'hub'
    cache.mkdir()
    monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_CACHE', str(cache))
    monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_OFFLINE', True)
    monkeypatch.chdir(tmp_path)

    def put(name, folder, revision='main', subfolder=''):
        repository = cache / f'models--{name.replace("/", "--")}'
        (repository / 'refs').mkdir(parents=True, exist_ok=True)
        (repository / 'refs' / revision).write_text(COMMIT[revision])
        shutil.copytree(folder, repository / 'snapshots' / COMMIT[revision] / subfolder, dirs_exist_ok=True)

    def upload(self, *, repo_id, folder_path, revision, commit_message):
        if revision is not None and not (cache / f'models--{repo_id.replace("/", "--")}' / 'refs' / revision).exists():
            raise huggingface_hub.errors.RevisionNotFoundError(revision)
        put(repo_id, folder_path, revision or 'main')
        return f'https://huggingface.co/{repo_id}/commit/{COMMIT["main"]}: {commit_message}'

    def create_repo(self, repo_id, *, private, exist_ok):
        (cache / f'models--somebody--{repo_id.removeprefix("somebody/")}').mkdir(exist_ok=exist_ok)
        return huggingface_hub.RepoUrl(f'https://huggingface.co/somebody/{repo_id.removeprefix("somebody/")}')

    def create_branch(self, repo_id, *, branch, exist_ok):
        refs = cache / f'models--{repo_id.replace("/", "--")}' / 'refs'
        refs.mkdir(exist_ok=True)
        (refs / branch).touch(exist_ok=exist_ok)

    monkeypatch.setattr(huggingface_hub.HfApi, 'create_repo', create_repo)
    monkeypatch.setattr(huggingface_hub.HfApi, 'create_branch', create_branch)
    monkeypatch.setattr(huggingface_hub.HfApi, 'upload_folder', upload)
    return put


def test_a_model_goes_up_with_a_card_and_comes_back(hub, tmp_path):
    quantizer = make_quantizer()
    address = quantizer.push_to_hub('somebody/quantizer', figures=dict(recall_at_1=0.51234))
    assert address.endswith(f'{COMMIT["main"]}: Upload MuLaNEmbedQuantizer')
    again = MuLaNEmbedQuantizer.from_pretrained('somebody/quantizer')
    assert_same(again.state_dict(), quantizer.state_dict())
    (card,) = (tmp_path / 'hub').rglob('README.md')
    told = card.read_text()
    assert told.startswith('---\n')
    assert 'library_name: musiclm-pytorch' in told
    assert "MuLaNEmbedQuantizer.from_pretrained('somebody/quantizer')" in told
    assert '| recall_at_1 | 0.5123 |' in told
    assert huggingface_hub.ModelCard(told).data.tags == ['music', 'audio', 'mulanembedquantizer']

    mulan = MuLaN.from_pretrained('somebody/quantizer', subfolder='mulan')
    assert torch.equal(mulan.audio_to_latents.weight, quantizer.mulan.audio_to_latents.weight)
    with torch.no_grad():
        quantizer.mulan.audio_to_latents.weight.fill_(0.5)
    quantizer.mulan.save_pretrained(tmp_path / 'other')
    hub('somebody/quantizer', tmp_path / 'other', revision='v1', subfolder='mulan')
    other = MuLaN.from_pretrained('somebody/quantizer', subfolder='mulan', revision='v1', dtype=torch.float64)
    assert (other.audio_to_latents.weight == 0.5).all()
    assert other.audio_to_latents.weight.dtype == torch.float64

    for _ in range(2):  # to a branch, of a name of one's own
        quantizer.push_to_hub('another', revision='v1')
    again = MuLaNEmbedQuantizer.from_pretrained('somebody/another', revision='v1')
    assert torch.equal(again.cond_embeddings['fine'], quantizer.cond_embeddings['fine'])
    (card,) = (tmp_path / 'hub' / 'models--somebody--another').rglob('README.md')
    assert "from_pretrained('somebody/another')" in card.read_text()
    with pytest.raises(ValueError, match='no codebooks yet'):
        MuLaNEmbedQuantizer(quantizer.mulan, conditioning_dims=(8,) * 3).push_to_hub('somebody/empty')
    assert not list((tmp_path / 'hub').glob('*empty'))


def test_every_codec_goes_up_and_comes_back(hub, tmp_path):
    codecs = [
        NeuralCodec(1600, codebook_size=8, num_quantizers=3, dim=16, bands=8, resolved_hz=400.0),
        SpectralCodec(1600, codebook_size=8, num_quantizers=2, bands=8, resolved_hz=400.0),
        PretrainedCodec(make_codec_model('dac'), 3),
    ]
    for codec in codecs:
        kind = type(codec)
        codec.push_to_hub(f'somebody/{kind.__name__}')
        for again in kind.from_pretrained(f'somebody/{kind.__name__}'), load_codec(f'somebody/{kind.__name__}'):
            assert_same(again.state_dict(), codec.state_dict())
            assert not again.training
    with pytest.raises(ValueError, match='somebody/NeuralCodec holds a NeuralCodec, not a SpectralCodec'):
        SpectralCodec.from_pretrained('somebody/NeuralCodec')


def test_every_kind_of_model(hub, tmp_path):
    hub('somebody/tiny', HOME / 'tiny')
    assert MusicLM.from_pretrained('somebody/tiny').sample_rate == 16000
    assert torch.equal(load_mulan('somebody/tiny').audio_to_latents.weight, load_mulan('tiny').audio_to_latents.weight)
    for part in tiny_clap():
        part.save_pretrained(tmp_path / 'clap')
    hub('somebody/clap', tmp_path / 'clap')
    texts = ['a flute']
    expected = PretrainedMuLaN(tmp_path / 'clap').get_text_latents(raw_texts=texts)
    assert torch.equal(PretrainedMuLaN('somebody/clap').get_text_latents(raw_texts=texts), expected)
    assert torch.equal(load_mulan('somebody/clap').get_text_latents(raw_texts=texts), expected)
    PretrainedMuLaN(tmp_path / 'clap').save_pretrained(tmp_path / 'ours')
    hub('somebody/ours', tmp_path / 'ours')
    hub('somebody/many', tmp_path / 'ours', revision='v1', subfolder='ours')
    hub('somebody/many', tmp_path / 'clap', revision='v1', subfolder='clap')
    at = dict(revision='v1', dtype=torch.float64)
    joints = [
        load_joint('somebody/ours'),
        load_mulan('somebody/ours'),
        PretrainedMuLaN.from_pretrained('somebody/ours'),
    ]
    joints += [load_joint('somebody/many', subfolder=name, **at) for name in ('ours', 'clap')]
    for joint in joints:
        torch.testing.assert_close(joint.get_text_latents(raw_texts=texts), expected)
    assert [next(it.parameters()).dtype for it in joints[2:]] == [torch.float32, torch.float64, torch.float64]

    model = make_codec_model('dac')
    model.save_pretrained(tmp_path / 'dac')
    hub('somebody/dac', tmp_path / 'dac')
    waves = torch.randn(1, 900)
    expected = PretrainedCodec(model, 3).encode(waves)
    for codec in PretrainedCodec('somebody/dac', 3), load_codec('somebody/dac', 3):
        assert torch.equal(codec.encode(waves), expected)


def test_what_is_not_there(hub, tmp_path):
    with pytest.raises(FileNotFoundError, match='somebody/else is no folder, and it cannot be had from the Hugging Fa'):
        MuLaN.from_pretrained('somebody/else')
    for load in PretrainedCodec, TransformersSemanticTokenizer, PretrainedMuLaN:
        with pytest.raises(FileNotFoundError, match='somebody/else is no folder.*if a folder was meant: there is no /'):
            load('somebody/else')
    (tmp_path / 'parts').mkdir()  # so that this is a path
    with pytest.raises(FileNotFoundError, match='no config.json in parts/mulan'):
        MuLaN.from_pretrained('parts/mulan')
    with pytest.raises(ValueError, match="tiny is no name on the Hugging Face Hub, so that it has no revision 'v1'"):
        MusicLM.from_pretrained('tiny', revision='v1')
    hub('somebody/tiny', HOME / 'tiny')
    with pytest.raises(FileNotFoundError, match='cannot be had'):
        MusicLM.from_pretrained('somebody/tiny', revision='v1')
    assert issubclass(MusicLM, HubModel)


def test_no_code_of_a_repository_is_run(hub, tmp_path, monkeypatch):
    monkeypatch.setattr('builtins.input', lambda prompt: 'y')  # transformers would ask
    code = dict(AutoConfig='absent.Config', AutoModel='absent.Model', AutoFeatureExtractor='absent.Extractor')
    make_codec_model('dac').save_pretrained(tmp_path / 'own')
    for name in 'config.json', 'preprocessor_config.json':
        (tmp_path / 'own' / name).write_text(json.dumps(dict(model_type='absent', auto_map=code)))
    hub('somebody/own', tmp_path / 'own')
    for source in tmp_path / 'own', 'somebody/own':
        for load in load_transformers, lambda it: load_processor(it, 'AutoFeatureExtractor'):
            with pytest.raises(ValueError, match='own needs code of its own .auto_map.*') as caught:
                load(source)
            assert 'trust_remote_code' not in str(caught.value)
    with pytest.raises(ValueError, match='own needs code of its own'):
        TransformersSemanticTokenizer(tmp_path / 'own', layer=1)


@pytest.mark.parametrize('content', [b'', b'{"a": ', b'[1]'])
def test_each_damaged_file_is_told_where_it_lies(content, tmp_path):
    for part in tiny_clap():
        part.save_pretrained(tmp_path)
    files = sorted(tmp_path.iterdir())
    assert len(files) >= 5
    loads = [PretrainedMuLaN, CLAPEmbedder, lambda path: TransformersSemanticTokenizer(path, layer=2)]
    for file in files:
        whole = file.read_bytes()
        file.write_bytes(content)
        for load in loads:
            if load is loads[-1] and file.name.startswith('tokenizer') and content == b'[1]':
                continue  # it reads none
            with pytest.raises((ValueError, FileNotFoundError), match=str(tmp_path)):
                load(tmp_path)
        file.write_bytes(whole)
    for load in loads:
        load(tmp_path)


def test_weights_that_are_not_read(hub, tmp_path):
    path = tmp_path / 'dac'
    model = make_codec_model('dac')
    model.save_pretrained(path)
    weights = (path / 'model.safetensors').read_bytes()
    (path / 'model.safetensors').write_bytes(weights[:500])
    with pytest.raises(ValueError, match='the weights in .*dac are damaged'):
        PretrainedCodec(path, 3)
    (path / 'model.safetensors').unlink()
    hub('somebody/dac', path)
    for source in path, 'somebody/dac':
        with pytest.raises(FileNotFoundError, match='dac has no weights, model.safetensors; if it has'):
            PretrainedCodec(source, 3)
    torch.save(model.state_dict(), path / 'pytorch_model.bin')
    told = r'dac holds its weights as a pickle only.* from_pretrained\(...\).save_pretrained\(folder\).* pass that'
    with pytest.raises(ValueError, match=told):
        PretrainedCodec(path, 3)
    (path / 'config.json').write_text('{"model_type": ')
    with pytest.raises(ValueError, match=r'dac/config.json is damaged, it is no JSON: Expecting value'):
        PretrainedCodec(path, 3)
