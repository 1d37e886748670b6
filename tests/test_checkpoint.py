"""Folders of models: where and in what they are loaded, and what a newer version wrote."""

import json
import shutil

import pytest
import torch
from helpers.models import tiny_mulan

from musiclm_pytorch import (
    MuLaN,
    MuLaNEmbedQuantizer,
    MuLaNSemanticTokenizer,
    MusicLM,
    generate_coarse,
    generate_fine,
    generate_semantic,
)
from musiclm_pytorch.atomic import read_checked_json
from musiclm_pytorch.audiolm.saving import load_module
from musiclm_pytorch.evaluation.evaluator import load_mulan
from musiclm_pytorch.mulan.int8 import dequantized, quantized
from musiclm_pytorch.pretrained import find_pretrained
from musiclm_pytorch.version import __version__

# what reads each folder of a MusicLM, and where its config has keywords
LOADERS = {
    '': (MusicLM.from_pretrained, 'sampling'),
    'quantizer': (MuLaNEmbedQuantizer.from_pretrained, 'quantizer'),
    'quantizer/mulan': (MuLaN.from_pretrained, 'text'),
    'tokenizer': (MuLaNSemanticTokenizer.from_pretrained, 'encoder'),
    'codec': (load_module, 'keywords'),
    'semantic': (load_module, 'keywords'),
}


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
    """A copy of the model that ships; a test may write over a config, and puts it back."""
    folder = shutil.copytree(find_pretrained('tiny'), tmp_path_factory.mktemp('saved') / 'tiny')
    for path in folder.rglob('config.json'):  # as who changes one by hand has to
        path.write_text(json.dumps(read_checked_json(path)))
    return folder


@pytest.fixture(params=LOADERS)
def config(saved, request):
    """The path of each config in it, what loads its folder, and the name of a part."""
    path = saved / request.param / 'config.json'
    before = path.read_text()
    yield path, *LOADERS[request.param]
    path.write_text(before)


@pytest.mark.parametrize('writer', ['9.1', None, __version__])
def test_keys_of_another_version_are_named(config, writer):
    path, load, part = config
    content = json.loads(path.read_text()) | dict(version=writer)
    for place in (content, content[part]):
        place['novelty'] = 3
        path.write_text(json.dumps(content))
        with pytest.raises(ValueError, match='novelty') as caught:
            load(path.parent)
        del place['novelty']
        said = str(caught.value)
        assert str(path) in said
        assert (f'under {part!r}' in said) == (place is content[part])
        assert __version__ in said
        assert (writer or 'does not say which wrote it') in said
    path.write_text(json.dumps(content))
    load(path.parent)


def test_values_that_do_not_build_a_model_name_the_file(saved):
    path = saved / 'quantizer' / 'mulan' / 'config.json'
    before = path.read_text()
    for value in ('wide', -3):
        content = json.loads(before)
        content['text']['max_seq_len'] = value
        path.write_text(json.dumps(content))
        with pytest.raises(
            ValueError, match=rf"{path}: what stands under 'text' builds no TextTransformer: .*max_seq_len"
        ):
            MuLaN.from_pretrained(path.parent)
    path.write_text(before)


@pytest.mark.parametrize('folder', LOADERS)
def test_every_loader_takes_device_and_dtype(saved, folder):
    load = LOADERS[folder][0]
    with pytest.raises(ValueError, match="device='cuda:99', but torch finds"):
        load(saved / folder, device='cuda:99')
    with pytest.raises(ValueError, match="'gpu' is no device"):
        load(saved / folder, device='gpu')
    with pytest.raises(TypeError, match='dtype must be a floating-point dtype such as torch.bfloat16, got torch.int8'):
        load(saved / folder, dtype=torch.int8)
    module = load(saved / folder, device=torch.device('cpu'), dtype=torch.bfloat16)
    assert not module.training
    weights = [it for it in module.parameters() if it.is_floating_point()]
    assert all(it.dtype == torch.bfloat16 for it in weights)
    assert weights or folder == 'codec'


@pytest.mark.parametrize('folder', LOADERS)
def test_folders_of_something_else(saved, tmp_path, folder):
    load = LOADERS[folder][0]
    with pytest.raises(FileNotFoundError, match=r'no config\.json .*written by \w+'):
        load(tmp_path)
    other = saved / ('quantizer' if folder == 'quantizer/mulan' else 'quantizer/mulan')
    for content in ('[]', (other / 'config.json').read_text()):
        (tmp_path / 'config.json').write_text(content)
        with pytest.raises(ValueError, match=r'config\.json is not the config of a \w+'):
            load(tmp_path)


def test_the_model_near_a_folder_is_named_and_so_is_what_a_config_is_of(tmp_path):
    tiny_mulan().save_pretrained(tmp_path / 'mulan' / 'last')
    for place in ('mulan', 'mulan/best'):
        with pytest.raises(FileNotFoundError, match='there is a model in .*mulan/last'):
            MuLaN.from_pretrained(tmp_path / place)
    with pytest.raises(ValueError, match='is not the config of a MusicLM: it is that of a MuLaN'):
        MusicLM.from_pretrained(tmp_path / 'mulan' / 'last')


def test_another_vocabulary_takes_over_its_own_tokens(tmp_path):
    def build(known, **text):
        mulan = tiny_mulan(dict(depth=1), dict(depth=1, known_tokens=known, **text), hierarchical_contrastive_loss=True)
        for _, weight in mulan.named_parameters():
            torch.nn.init.normal_(weight)
        return mulan

    def row(mulan, token):
        rows = mulan.text.rows
        return mulan.text.token_emb.weight[token if rows is None else rows[token]]

    old = build([5, 3, 9])
    old.save_pretrained(tmp_path)
    new = build([3, 8, 5], max_seq_len=20)
    before = {name: weight.clone() for name, weight in new.named_parameters()}
    says = (
        f'9[0-9]% of the weights come from {tmp_path}; not 1 of the 4 rows of text.token_emb.weight; 8 of the 20 rows'
    )
    with pytest.warns(UserWarning, match=says) as told:
        left = new.load_matching(tmp_path)
    assert [it.filename for it in told] == [__file__]
    assert len(left) == 2
    for token in (3, 5, 0):  # 0 is known to neither
        assert torch.equal(row(new, token), row(old, token))
    assert torch.equal(row(new, 8), before['text.token_emb.weight'][1])
    # and what is known of them: that 8 was never trained
    assert new.text.known_ids().nonzero()[:, 0].tolist() == [3, 5]
    assert torch.equal(new.text.pos_emb.weight[:12], old.text.pos_emb.weight)
    assert torch.equal(new.text.pos_emb.weight[12:], before['text.pos_emb.weight'][12:])
    own, others = new.state_dict(), old.state_dict()
    changed = {
        name for name in own if own[name].shape != others[name].shape or not torch.equal(own[name], others[name])
    }
    assert changed == {'text.token_emb.weight', 'text.pos_emb.weight'}

    whole = build(None)  # a vocabulary of which all is known
    with pytest.warns(UserWarning, match='97 of the 100 rows of text.token_emb.weight'):
        whole.load_matching(tmp_path)
    assert torch.equal(row(whole, 9), row(old, 9))
    assert whole.text.known_ids().nonzero()[:, 0].tolist() == [3, 5, 9]
    other = build(None, num_tokens=81)
    with pytest.warns(UserWarning, match='81 of the 81 rows of text.token_emb.weight'):
        other.load_matching(tmp_path)  # another tokenizer: its ids mean other words
    assert not other.text.trained_tokens.any()
    assert build([5, 3, 9]).load_matching(tmp_path) == []

    whole.text.trained_tokens = None  # as of weights from elsewhere
    whole.save_pretrained(tmp_path)
    again = build(None)
    assert again.load_matching(tmp_path) == []
    assert again.text.trained_tokens is None


def test_a_record_of_trained_tokens_that_is_none_names_its_file(tmp_path):
    mulan = tiny_mulan(dict(depth=1), dict(depth=1))
    mulan.text.trained_tokens[[7, 98]] = True
    mulan.save_pretrained(tmp_path)
    assert MuLaN.from_pretrained(tmp_path).text.trained_tokens.nonzero()[:, 0].tolist() == [7, 98]
    path = tmp_path / 'config.json'
    content = json.loads(path.read_text())
    for told, says in (('AAAAAAAAAAAAAAAAAAE=', 'there are 112 bits for 100 tokens'), ('é', 'base64'), (3, 'base64')):
        path.write_text(json.dumps(content | dict(trained_tokens=told)))
        with pytest.raises(ValueError, match=f"{path}: what stands under 'trained_tokens' are no tokens: .*{says}"):
            MuLaN.from_pretrained(tmp_path, verify=False)


def test_what_does_not_fit_is_named(tmp_path):
    tiny_mulan(dict(depth=2), dict(depth=1, dim=16)).save_pretrained(tmp_path)
    mulan = tiny_mulan(dict(depth=1), dict(depth=1), sigmoid_contrastive_loss=True)
    with pytest.warns(UserWarning, match=r'contrast.bias, which is not there|and \d+ more'):
        left = mulan.load_matching(tmp_path)
    assert 'contrast.bias, which is not there' in ' '.join(left)
    assert 'text.token_emb.weight (100, 24), which is (100, 16) there' in left
    assert any(it.startswith('audio.transformer.layers.1.0.') and 'no place here' in it for it in left)


def test_a_musiclm_in_half_precision_makes_music(saved):
    whole, half = (MusicLM.from_pretrained(saved, dtype=dtype) for dtype in (None, torch.bfloat16))
    wave = half('a slow low organ', seconds=0.5, seed=1)
    assert wave.dtype == torch.float32
    assert wave.std() > 1e-3
    # what is not weights is not rounded: the same codes mean the same sound
    codes = torch.randint(half.codec.codebook_size, (1, 12, half.codec.num_quantizers))
    assert torch.equal(*(it.codec.decode_from_codebook_indices(codes) for it in (whole, half)))
    assert all(it.dtype == torch.float32 for it in half.tokenizer.kmeans.buffers() if it.is_floating_point())
    latents = (load_mulan(saved, dtype=dtype).get_text_latents(raw_texts=['a flute']) for dtype in (None, torch.half))
    torch.testing.assert_close(*latents, atol=2e-2, rtol=0)


def test_auto_halves_the_stages_that_gain(saved, tmp_path, monkeypatch):
    def kinds(musiclm):
        stages = {it.dtype for stage in musiclm.stages.values() for it in stage.parameters()}
        return stages, musiclm.mulan_embed_quantizer.cond_embeddings['fine'].dtype

    assert kinds(MusicLM.from_pretrained(saved, dtype='auto')) == ({torch.float32}, torch.float32)  # too small
    monkeypatch.setattr('musiclm_pytorch.audiolm.decode_step.WORTH_HALVING', 0)
    for can, dtype in ((False, torch.float32), (True, torch.bfloat16)):
        monkeypatch.setattr('musiclm_pytorch.audiolm.decode_step.computes_in_bf16', lambda can=can: can)
        musiclm = MusicLM.from_pretrained(saved, dtype='auto')
        assert kinds(musiclm) == ({dtype}, torch.float32)
    musiclm.save_pretrained(tmp_path / 'half')
    again = MusicLM.from_pretrained(tmp_path / 'half', dtype='auto')
    assert torch.equal(*(it('a slow low organ', seconds=0.5, seed=1) for it in (musiclm, again)))
    with pytest.raises(TypeError, match="'int4'"):
        MusicLM.from_pretrained(saved, dtype='int4')


def test_int8_is_small_and_near(saved, tmp_path):
    """Stages and MuLaN with a scale a row: half of float16, what is sampled from hardly changes."""
    whole = MusicLM.from_pretrained(saved)
    for name, dtype in dict(half=torch.float16, small=torch.int8).items():
        whole.save_pretrained(tmp_path / name, dtype=dtype)
    for part in ('semantic', 'coarse', 'fine', 'quantizer/mulan'):
        half, small = ((tmp_path / it / part / 'model.safetensors').stat().st_size for it in ('half', 'small'))
        assert small < 0.53 * half
    small = MusicLM.from_pretrained(tmp_path / 'small')
    rounded = ('semantic.', 'coarse.', 'fine.', 'mulan_embed_quantizer.mulan.')
    found, changed = small.state_dict(), set()
    for name, own in whole.state_dict().items():
        assert found[name].dtype == own.dtype
        if torch.equal(found[name], own):  # the model that ships is of float16
            continue
        changed.add(name)
        assert name.startswith(rounded)
        assert 'pos_bias' not in name
        bound = own.abs().amax(dim=-1, keepdim=True) / 127 / 2
        assert ((found[name] - own).abs() <= bound * 1.001 + 1e-9).all()
    for part in rounded:  # it is the matrices that are rounded
        assert any(it.startswith(part) for it in changed)
    # the same conditioning, and losses of the same tokens within 1 %
    prompts = ['a slow low organ', 'a fast happy flute melody', 'drums']
    codes = [it.mulan_embed_quantizer.indices(raw_texts=prompts) for it in (whole, small)]
    assert (codes[0] == codes[1]).float().mean() > 0.95
    embeds = {stage: whole.mulan_embed_quantizer(raw_texts=prompts, namespace=stage) for stage in whole.stages}
    torch.manual_seed(0)
    draw = dict(max_length=16, min_length=16)
    semantic = generate_semantic(whole.semantic, text_embeds=embeds['semantic'], **draw).tokens
    coarse = generate_coarse(whole.coarse, semantic[:, :8], text_embeds=embeds['coarse'], **draw).tokens
    fine = generate_fine(whole.fine, coarse, text_embeds=embeds['fine']).tokens
    for stage, ids in dict(semantic=(semantic,), coarse=(semantic[:, :8], coarse), fine=(coarse, fine)).items():
        with torch.no_grad():
            losses = [it.stages[stage].loss(*ids, conditioning=embeds[stage]) for it in (whole, small)]
        torch.testing.assert_close(*losses, rtol=1e-2, atol=0)
        assert not torch.equal(*losses)
    # what was rounded stays as it is
    small.save_pretrained(tmp_path / 'again', dtype=torch.int8)
    again = MusicLM.from_pretrained(tmp_path / 'again')
    assert torch.equal(*(it('a slow low organ', seconds=0.5, seed=1) for it in (small, again)))


def test_int8_of_what_has_no_scale(saved, tmp_path):
    rows = torch.randn(3, 2, 40)
    rows[0, 1] = 0
    weights = dict(w=rows, b=torch.randn(40), n=torch.arange(40).view(1, 40), narrow=torch.randn(40, 5))
    found = dequantized(quantized(weights))
    assert found.keys() == weights.keys()
    assert (found['w'][0, 1] == 0).all()
    assert (found['w'] - rows).abs().max() < rows.abs().max() / 250
    assert torch.equal(found['n'], weights['n'])
    assert found['b'].dtype == found['narrow'].dtype == torch.float16
    own = {'w.scale': torch.ones(3), 'w': torch.ones(3, 40)}  # a name that a model may have itself
    assert dequantized(own).keys() == own.keys()
    musiclm = MusicLM.from_pretrained(saved)
    with pytest.raises(TypeError, match='such as torch.float16, or in int8, got torch.int16'):
        musiclm.save_pretrained(tmp_path / 'other', dtype=torch.int16)
    with torch.no_grad():
        musiclm.semantic.semantic_embedding.weight[3, 4] = torch.inf
    with pytest.raises(ValueError, match='semantic_embedding.weight in .* holds inf'):
        musiclm.save_pretrained(tmp_path / 'other', dtype=torch.int8)
    assert not (tmp_path / 'other').exists()
