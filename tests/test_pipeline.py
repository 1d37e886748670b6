"""`musiclm train all` and `train_musiclm`: from pairs to a MusicLM, in parts that are not made twice."""

import contextlib
import io
import json
import logging.handlers
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from helpers.pipeline import STEPS, TINY
from helpers.recipes import CODEC, written
from helpers.sounds import ramp, write
from helpers.training import assert_same
from safetensors.torch import load_file

from musiclm_pytorch import MusicLM, MusicLMRecipe, ShardedAudioText, SyntheticMusic, train_musiclm
from musiclm_pytorch.atomic import write_json
from musiclm_pytorch.cli import main
from musiclm_pytorch.data.shards import ShardItems
from musiclm_pytorch.trainer import pipeline
from musiclm_pytorch.trainer.pipeline_recipe import FittedRecipe
from musiclm_pytorch.trainer.recipes import FITTED_PARTS, MuLaNRecipe
from musiclm_pytorch.trainer.stage_recipes import STAGE_RECIPES

PARTS = ['mulan', 'quantizer', 'tokenizer', 'codec', 'tokens', 'semantic', 'coarse', 'fine', 'musiclm']

EXAMPLE = Path(__file__).parents[1] / 'examples' / 'recipes' / 'small.yaml'


@pytest.fixture(scope='module')
def config(tmp_path_factory):
    path = tmp_path_factory.mktemp('recipe') / 'all.json'
    path.write_text(json.dumps(TINY))
    return path


@pytest.fixture(scope='module')
def music(tmp_path_factory):
    folder = tmp_path_factory.mktemp('music')
    for index in range(3):
        write(folder / f'{index}.wav', ramp(1), caption=f'clip {index}')
    write(folder / 'mute.wav', ramp(1), caption=None)
    return folder


@pytest.fixture(scope='module')
def whole(tmp_path_factory, music, config):
    """The folder in which every part was trained, interrupted and gone on with by the command, and what that printed
    and logged. That it is the same as without is shown part by part."""
    folder, printed = tmp_path_factory.mktemp('whole') / 'out', io.StringIO()

    def interrupted(name, *_):
        if name == 'tokenizer':
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_musiclm(music, folder, MusicLMRecipe.load(config), on_begin=interrupted)
    logged = logging.handlers.BufferingHandler(capacity=1000)
    logging.getLogger().addHandler(logged)
    with contextlib.redirect_stdout(printed):
        assert main(['train', 'all', '--data', str(music), '--output', str(folder), '--resume']) == 0
    logging.getLogger().removeHandler(logged)
    return folder, printed.getvalue().splitlines(), [record.getMessage() for record in logged.buffer]


def assert_same_music(one, other):
    assert (one.windows, one.sampling) == (other.windows, other.sampling)
    assert_same(one.state_dict(), other.state_dict())


def test_from_pairs_to_music(whole):
    out, printed, logged = whole
    lines = [line for n, part in enumerate(PARTS, 1) for line in (f'part {n} of {len(PARTS)}, {part}', part)]
    assert [line.split(':')[0] for line in printed[: len(lines)]] == lines
    assert f'the model is in {out / "musiclm"}' in printed[-1]
    # every part opens the data, and what is left out of them is told once
    assert sum('mute.wav' in line for line in logged) == 1
    musiclm = MusicLM.from_pretrained(out / 'musiclm')
    assert musiclm.windows == (0.5, 0.2, 0.2)
    assert musiclm.sampling['cond_scale'] == 2.0
    wave = musiclm('clip 0', seconds=0.6, seed=0)
    assert wave.shape == (1, 4800)
    assert wave.isfinite().all()


def test_what_is_there_is_not_made_again(tmp_path, music, config, whole, capsys):
    out = shutil.copytree(whole[0], tmp_path / 'out')
    command = ['train', 'all', '--data', str(music), '--output', str(out), '--resume']
    weights = {path: path.stat().st_mtime_ns for path in out.rglob('last/model.safetensors')}
    assert main(command) == 0
    assert {path: path.stat().st_mtime_ns for path in out.rglob('last/model.safetensors')} == weights
    assert_same_music(*(MusicLM.from_pretrained(it / 'musiclm') for it in (out, whole[0])))

    # a part that is missing is made again, and nothing else
    (out / 'fine' / 'last' / 'config.json').unlink()
    del weights[out / 'fine' / 'last' / 'model.safetensors']
    assert main(command) == 0
    assert (out / 'fine' / 'last' / 'config.json').is_file()
    assert all(path.stat().st_mtime_ns == time for path, time in weights.items())

    # how a stage is trained may change before it is begun, by an option too
    shutil.rmtree(out / 'fine')
    assert main([*command, '--fine.training.batch_size', '2']) == 0
    assert json.loads((out / 'recipe.json').read_text())['fine']['training']['batch_size'] == 2
    assert main([*command, '--fine.training.batch_size', '3']) == 2
    assert 'has another recipe: fine' in capsys.readouterr().err

    # and so may whatever nothing was made of yet; what is put together at the end always may
    assert main([*command, '--fine.model.depth', '2']) == 2
    shutil.rmtree(out / 'fine')
    assert main([*command, '--fine.model.dim', '32']) == 2  # the quantizer has embeddings for another
    assert main([*command, '--fine.model.depth', '2', '--musiclm.dtype', 'float16']) == 0
    assert len(MusicLM.from_pretrained(out / 'musiclm').fine.transformer.layers) == 2

    # another recipe is not mixed with what is there
    assert main([*command, '--config', str(config), '--seed', '3']) == 2
    assert 'has another recipe: mulan' in capsys.readouterr().err


def test_a_batch_larger_than_the_data_is_refused_before_anything_is_trained(tmp_path, music, config, capsys):
    command = ['train', 'all', '--data', str(music), '--config', str(config), '--output', str(tmp_path / 'out')]
    assert main([*command, '--coarse.training.batch_size', '4']) == 2
    told = capsys.readouterr().err
    assert 'the part coarse has batches of 4, but of 3 clips 2 are left beside those held out' in told
    assert '--coarse.training.batch_size 2' in told
    assert not (tmp_path / 'out').exists()


def test_what_fails_late_may_be_told_anew_without_what_is_made(tmp_path, music, config, capsys):
    out = tmp_path / 'out'
    command = ['train', 'all', '--data', str(music), '--output', str(out)]
    # what no data are needed for is seen before anything is trained
    assert main([*command, '--config', str(config), '--spectral_codec.resolved_hz', '4000']) == 2
    assert 'resolved_hz must lie below half of the sample rate' in capsys.readouterr().err
    assert not out.exists()
    few = '--quantizer.codebook_size', '100'
    assert main([*command, '--config', str(config), *few]) == 2
    assert 'give more data or a smaller codebook_size' in capsys.readouterr().err
    trained = (out / 'mulan' / 'last' / 'model.safetensors').stat().st_mtime_ns
    assert main([*command, '--resume', '--quantizer.codebook_size', '2']) == 0
    assert (out / 'mulan' / 'last' / 'model.safetensors').stat().st_mtime_ns == trained


def test_part_by_part_and_without_an_interruption_it_is_the_same(tmp_path, music, config, whole):
    parts = tmp_path / 'parts'

    def run(*arguments):
        assert main([*map(str, arguments), '--config', str(config)]) == 0

    run('train', 'mulan', '--data', music, '--output', parts / 'mulan')
    for part in 'quantizer', 'tokenizer':
        run('train', part, '--mulan', parts / 'mulan', '--data', music, '--output', parts / part)
    run('train', 'codec', '--data', music, '--output', parts / 'codec')
    made = [it for part in ('tokenizer', 'codec', 'quantizer') for it in (f'--{part}', str(parts / part))]
    assert main(['tokens', '--data', str(music), '-o', str(parts / 'tokens'), *made]) == 0
    for stage in 'semantic', 'coarse', 'fine':
        given = ['--tokens', parts / 'tokens', '--quantizer', parts / 'quantizer']
        run('train', stage, *given, '--output', parts / stage)
    run('assemble', parts, '-o', tmp_path / 'musiclm')
    assert_same_music(*(MusicLM.from_pretrained(it) for it in (whole[0] / 'musiclm', tmp_path / 'musiclm')))


def test_nothing_to_resume_is_told_and_faults_and_other_data_move_nothing(tmp_path, music, config, caplog):
    out, recipe = tmp_path / 'out', MusicLMRecipe.load(config)
    (tmp_path / 'out.2').mkdir()
    recipe.save(tmp_path / 'out.2')

    def interrupted(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_musiclm(music, out, recipe, resume=True, on_begin=interrupted)
    said = (
        f'nothing to resume in {out}: every part is trained from its beginning; an earlier run is in {tmp_path}/out.2'
    )
    assert said in caplog.text
    assert 'no checkpoint' not in caplog.text
    left = sorted(out.rglob('*'))
    with pytest.raises(FileNotFoundError):
        train_musiclm(tmp_path / 'nowhere', out, recipe)
    with pytest.raises(ValueError, match=r"was begun with '.*music.*', now the data are '.*elsewhere'"):
        train_musiclm(tmp_path / 'elsewhere', out, resume=True)
    assert sorted(out.rglob('*')) == left


def test_with_a_soundstream_and_melodies(tmp_path, music, config):
    content = {name: it for name, it in TINY.items() if name != 'spectral_codec'}
    encoder = dict(dim=16, depth=1, heads=2, dim_head=8, dim_latent=8, seconds=0.5, hop=0.24)
    content['melody'] = dict(
        model=dict(**encoder, num_quantizers=1, codebook_size=2),
        data=dict(length=8, seconds=1.0),
        training=STEPS,
    )
    content['codec'] = dict(model=CODEC, training=dict(**STEPS, seconds=0.2, valid_frac=0.4))
    recipe = MusicLMRecipe.from_content(content, 'the recipe')
    musiclm = train_musiclm(music, tmp_path / 'out', recipe)
    assert type(musiclm.codec.module).__name__ == 'SoundStream'
    # the semantic stage has learned of melodies
    again, codes = MusicLM.from_pretrained(tmp_path / 'out' / 'musiclm'), torch.zeros(1, 2, 1, dtype=torch.long)
    told = [it.mulan_embed_quantizer.embed_melody(codes, 2, it.semantic_rate) for it in (musiclm, again)]
    assert torch.equal(*told)
    assert told[0].any()
    assert MusicLMRecipe.load(tmp_path / 'out' / 'recipe.json').to_dict() == recipe.to_dict()


def test_without_a_fine_stage(tmp_path, music):
    content = {**TINY, 'spectral_codec': TINY['spectral_codec'] | dict(num_quantizers=1)}
    del content['fine']
    path = written(tmp_path, yaml.safe_dump(content) + 'fine: no\n')
    recipe, told = MusicLMRecipe.load(path), []
    musiclm = train_musiclm(music, tmp_path / 'out', recipe, on_part=lambda name, _: told.append(name))
    assert told == [name for name in PARTS if name != 'fine']
    assert list(musiclm.stages) == ['semantic', 'coarse']
    assert MusicLMRecipe.load(tmp_path / 'out' / 'recipe.json').to_dict() == recipe.to_dict()
    assert main(['assemble', str(tmp_path / 'out'), '-o', str(tmp_path / 'again'), '--config', str(path)]) == 0
    assert_same_music(*(MusicLM.from_pretrained(tmp_path / it) for it in ('again', 'out/musiclm')))


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        (dict(fine=False), 'the coarse one makes all 3 levels of the codec, but num_coarse_quantizers is 1'),
        (dict(tokeniser={}), "unknown part 'tokeniser'; did you mean 'tokenizer'"),
        (dict(codec={}), 'keep one'),
        (dict(mulan=dict(audio=dict(dimm=3))), "part mulan: unknown key 'dimm'.*did you mean 'dim'"),
        (dict(quantizer=dict(conditioning_dims=[1])), 'it follows from the parts semantic, coarse and fine'),
        (dict(coarse=dict(model=dict(num_coarse_quantizers=2))), 'makes 2 levels of codes, but the fine stage'),
        (dict(spectral_codec=dict(num_quantizers=1)), 'must lie between 1 and 0, one less than the quantizers'),
        (dict(semantic=dict(training=dict(unique_consecutive=True))), 'read the same tokens'),
        (
            dict(
                melody={},
                **{it: TINY[it] | dict(training=dict(unique_consecutive=True)) for it in ('semantic', 'coarse')},
            ),
            'melodies need tokens that tell times',
        ),
    ],
)
def test_a_recipe_says_what_is_wrong(changes, message):
    with pytest.raises(ValueError, match=message):
        MusicLMRecipe.from_content({**TINY, **changes}, 'the recipe')


def test_one_process_only(tmp_path, monkeypatch):
    monkeypatch.setenv('WORLD_SIZE', '2')
    with pytest.raises(ValueError, match='musiclm tokens'):
        train_musiclm('synthetic', tmp_path / 'out')
    assert not (tmp_path / 'out').exists()


def test_the_recipe_of_a_whole_serves_its_parts(config, tmp_path):
    assert set(FITTED_PARTS) == set(FittedRecipe.SECTIONS)
    assert MuLaNRecipe.load(config).text['dim'] == 32
    assert STAGE_RECIPES['coarse'].load(config).training['seconds'] == 0.2
    with (
        pytest.raises(ValueError, match="all.json, part fine, section 'training'"),
        STAGE_RECIPES['fine'].load(config).section('training'),
    ):
        raise ValueError('x')
    # what a recipe of MuLaN alone says of its section mulan is no part
    (tmp_path / 'mulan.json').write_text(json.dumps(dict(mulan=dict(dim_latent=8))))
    assert MuLaNRecipe.load(tmp_path / 'mulan.json').mulan['dim_latent'] == 8


def test_recipes_that_ship(capsys):
    assert main(['recipes']) == 0
    names = {line.split()[0] for line in capsys.readouterr().out.splitlines()}
    assert names == {'codec_neural', 'mulan_small', 'musiclm_sampled', 'musiclm_small', 'musiclm_tiny'}
    assert main(['recipes', 'mulan_small']) == 0
    assert yaml.safe_load(capsys.readouterr().out)['audio']['use_case'] == 'tonal'
    assert main(['recipes', 'large']) == 2
    told = "no recipe 'large' in the package; known are codec_neural, mulan_small, musiclm_sampled"
    assert told in capsys.readouterr().err
    with pytest.raises(FileNotFoundError, match='no recipe large, neither a file nor in the package'):
        MuLaNRecipe.load('large')


@pytest.mark.parametrize('name', ['musiclm_small', 'musiclm_tiny'])
def test_the_shipped_recipes_are_valid(name):
    recipe = MusicLMRecipe.load(name)
    assert recipe.conditioning_dims == [192, 192, 160]
    assert recipe.windows == (5.0, 0.32, 0.96)


@pytest.mark.parametrize(('name', 'made_by'), [('tiny', 'musiclm_tiny'), ('small', EXAMPLE)])
def test_what_ships_is_what_its_recipe_makes(name, made_by):
    recipe, shipped = MusicLMRecipe.load(made_by), MusicLM.from_pretrained(name)
    assert recipe.fitted.musiclm['knows'] == shipped.knows
    assert shipped.sampling == {**shipped.sampling, **recipe.fitted.musiclm.get('sampling', {})}
    assert recipe.windows == shipped.windows
    assert (recipe.fine is None) == ('fine' not in shipped.stages)
    for part, stage in shipped.stages.items():
        model = getattr(recipe, part).model
        assert {key: stage.config[key] for key in model} == model
    codes, quantizer = recipe.fitted.quantizer, shipped.mulan_embed_quantizer
    assert (quantizer.num_codebooks, quantizer.codebook_size) == (codes['rq_num_quantizers'], codes['codebook_size'])
    assert shipped.tokenizer.codebook_size == recipe.fitted.tokenizer['codebook_size']


def test_keys_are_listed(capsys):
    assert main(['recipes', '--keys']) == 0
    lines = capsys.readouterr().out.splitlines()
    assert 'mulan.training.warmup_steps: int = 500' in lines
    assert 'quantizer.trained_words_only: bool' in lines
    assert 'semantic.training.text_share: float = 0.0' in lines
    assert main(['recipes', 'fine', '--keys']) == 0
    assert 'model.num_coarse_quantizers: int = 3' in capsys.readouterr().out.splitlines()
    assert main(['recipes', 'fines', '--keys']) == 2
    assert "unknown part 'fines'; did you mean 'fine'" in capsys.readouterr().err


def test_keys_on_the_command_line(tmp_path, config, monkeypatch, capsys):
    taken = []
    monkeypatch.setattr(pipeline, 'train_musiclm', lambda data, output, recipe, **_: taken.append(recipe))
    command = ['train', 'all', '--data', 'synthetic', '--output', str(tmp_path / 'out'), '--config', str(config)]
    assert main([*command, '--semantic.training.lr', '1e-3', '--quantizer.codebook_size=8', '--seed', '3']) == 0
    trained = [getattr(taken[0], part).training['seed'] for part in ('mulan', 'semantic', 'coarse', 'fine')]
    assert {*trained, taken[0].fitted.quantizer['seed']} == {3}
    assert (taken[0].semantic.training['lr'], taken[0].fitted.quantizer['codebook_size']) == (1e-3, 8)
    assert taken[0].semantic.training['seconds'] == 0.5
    assert main([*command, '--pretrained_codec.source', 'elsewhere']) == 0  # takes the place of the spectral codec
    assert 'spectral_codec' not in taken[1].to_dict()
    # what is no, a number or a mapping in YAML is a word where a word is wanted
    words = ['--mulan.training.mixed_precision', 'no', '--musiclm.knows', 'styles: jazz', '--tokenizer.model', '2024']
    assert main([*command, *words, '--fine.training.use_ema', 'no']) == 0
    assert taken[2].mulan.training['mixed_precision'] == 'no'
    assert (taken[2].fitted.musiclm['knows'], taken[2].fitted.tokenizer['model']) == ('styles: jazz', '2024')
    assert taken[2].fine.training['use_ema'] is False
    # a key counts beside --codec, too
    assert main([*command, '--codec', 'elsewhere', '--pretrained_codec.num_quantizers', '4']) == 0
    assert taken[3].fitted.pretrained_codec == dict(source='elsewhere', num_quantizers=4)
    assert main([*command, '--semantics.training.lr', '1']) == 2
    assert "the command line: unknown part 'semantics'; did you mean 'semantic'" in capsys.readouterr().err


def test_what_would_fail_in_the_end_fails_at_once(tmp_path, config, music):
    recipe = MusicLMRecipe.load(config)

    def fails(match, recipe=recipe, data=music, **keywords):
        with pytest.raises(ValueError, match=match):
            train_musiclm(data, tmp_path / 'out', recipe, **keywords)

    asks = recipe.updated(dict(musiclm=dict(usual_score_prompts=3)), 'a test')
    fails('usual_score_prompts needs held-out captions', asks)
    fails('the semantic stage in .* has dim 192, the recipe says .*begin_with is for stages', begin_with='tiny')
    timed = MusicLMRecipe.load('musiclm_tiny').updated({'coarse': {'model': {'semantic_per_frame': 0.5}}}, 'a test')
    with pytest.raises(ValueError, match=r'the coarse stage in .* has semantic_per_frame None, the recipe says 0\.5'):
        train_musiclm('synthetic', tmp_path / 'out', timed, begin_with='tiny')
    assert not (tmp_path / 'out' / 'mulan').exists()
    (tmp_path / 'out' / 'musiclm').mkdir(parents=True)
    (tmp_path / 'out' / 'musiclm' / 'config.json').write_text('{"model": "MusicLM"}')
    fails('begin_with .* lies in .*, which a new run moves aside', begin_with=tmp_path / 'out' / 'musiclm')
    fails('valid_data .* lies in', valid_data=tmp_path / 'out' / 'held')
    assert (tmp_path / 'out' / 'musiclm' / 'config.json').exists()


def test_a_run_goes_on_with_what_it_was_begun_with(tmp_path):
    path, keys = tmp_path / 'data.json', ('data', 'audio_folder', 'valid_data', 'valid_audio_folder', 'begin_with')
    begun = dict.fromkeys(keys) | dict(data='a', valid_data='b', begin_with='c')
    assert pipeline.agreed_source(path, begun) == begun
    write_json(path, begun)
    assert pipeline.agreed_source(path, dict.fromkeys(keys) | dict(data='a')) == begun
    with pytest.raises(ValueError, match='was begun with c, now begin_with is d'):
        pipeline.agreed_source(path, begun | dict(begin_with='d'))
    write_json(path, dict(data='a', audio_folder=None))  # as earlier versions wrote it
    assert pipeline.agreed_source(path, dict.fromkeys(keys) | dict(data='a')) == dict.fromkeys(keys) | dict(data='a')


@pytest.mark.slow
def test_generated_music_is_rendered_once_and_a_run_begins_with_another(tmp_path):
    made = dict(synthetic_length=6, synthetic_seconds=1.0, synthetic_seed=3, synthetic_mentions=dict(drums=1.0))
    content = TINY | dict(
        mulan=TINY['mulan']
        | dict(
            data=dict(max_seconds=1.0, synthetic_length=12, synthetic_valid_length=4, group_by=['drums']),
            training=dict(**STEPS, group_size=2),
        ),
        quantizer=dict(rq_num_quantizers=2, codebook_size=2, trained_words_only=True),
        tokens=dict(**made, synthetic_rendered=8000),
        musiclm=dict(dtype='float16', usual_score_prompts=3, knows='drums'),
    )
    recipe = MusicLMRecipe.from_content(content, 'the recipe')
    one = train_musiclm('synthetic', tmp_path / 'one', recipe)
    shards = ShardItems(ShardedAudioText(tmp_path / 'one' / 'clips', sample_rate=8000))
    music = SyntheticMusic(6, seed=3, seconds=1.0, sample_rate=8000, mentions=dict(drums=1.0))
    assert {item['caption'] for item in shards} == {music.text(index) for index in range(6)}
    saved = MusicLM.from_pretrained(tmp_path / 'one' / 'musiclm')
    assert (saved.knows, saved.usual_score) == ('drums', one.usual_score)
    assert -1 < one.usual_score < 1
    text = one.mulan_embed_quantizer.mulan.text
    assert len(text.config['known_tokens']) == len(text.token_emb.weight) - 1 < 200
    weights = load_file(tmp_path / 'one' / 'musiclm' / 'semantic' / 'model.safetensors')
    assert {it.dtype for it in weights.values()} == {torch.float16}

    still = {name: dict(training=dict(lr=1e-12)) for name in ('mulan', 'semantic', 'coarse', 'fine')}
    other = train_musiclm(
        'synthetic', tmp_path / 'two', recipe.updated(still, 'a test'), begin_with=tmp_path / 'one' / 'musiclm'
    )
    for part in ('codec', 'tokenizer', 'semantic', 'fine'):
        before, after = (getattr(it, part).state_dict() for it in (saved, other))
        assert before.keys() == after.keys()
        assert all((before[name].float() - it.float()).abs().max() < 1e-6 for name, it in after.items()), part
