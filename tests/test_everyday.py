"""Ordinary words: what they mean, and a MuLaN that is taught them."""

import re
from collections import Counter
from itertools import chain

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.models import tiny_mulan

from musiclm_pytorch import MuLaN, SyntheticMusic
from musiclm_pytorch.audiolm.fingerprints import fingerprint_data
from musiclm_pytorch.data.attributes import ATTRIBUTES, SAMPLED, SAMPLED_ATTRIBUTES, MusicLabels
from musiclm_pytorch.data.captions import check_shares, draw_mentions, write_caption
from musiclm_pytorch.data.everyday import EIGHT, draw_prompt, everyday_words, plain_captions
from musiclm_pytorch.mulan.text_transformer import VOCAB_SIZE
from musiclm_pytorch.trainer.assembly import fit_quantizer, with_trained_words
from musiclm_pytorch.trainer.pipeline import train_musiclm
from musiclm_pytorch.trainer.pipeline_recipe import FittedRecipe, MusicLMRecipe
from musiclm_pytorch.trainer.words import teach_words

# said outright, and by a style where no other instrument is named
OUTRIGHT = {
    'relaxing': dict(mode='major', tempo='slow'),
    'furious': dict(mode='minor', tempo='fast'),
    'drumless': dict(drums=False),
    'with kick and snare': dict(drums=True),
    'twinkling': dict(register='high'),
}
STYLES = {'lo-fi': 'electric piano', 'thrash metal': 'electric guitar', 'tango': 'accordion', 'lullaby': 'bell'}


def test_prompts_mean_what_their_words_do():
    random, seen = np.random.default_rng(0), Counter()
    names = [it.lstrip('*') for it in chain(*everyday_words()['instruments'].values())]
    for _ in range(12_000):
        text, meaning = draw_prompt(random)
        assert text
        assert text == text.strip()
        assert '{' not in text
        assert '  ' not in text
        assert all(value in SAMPLED_ATTRIBUTES[name] for name, value in meaning.items())
        for words, means in OUTRIGHT.items():
            if re.search(rf'\b{words}\b', text):
                seen[words] += 1
                assert means.items() <= meaning.items(), (text, meaning)
        for words, instrument in STYLES.items():
            if words in text and not any(name in text for name in names):
                seen[words] += 1
                assert meaning['instrument'] == instrument, (text, meaning)
    assert all(seen[words] > 5 for words in (*OUTRIGHT, *STYLES)), seen


def test_a_share_of_the_captions_of_a_data_set_are_such_prompts_and_true():
    plain, music = (SyntheticMusic(3000, sample_rate=8000, everyday=share) for share in (0.0, 0.4))
    other = [i for i in range(3000) if music.text(i) != plain.text(i)]
    assert 1050 < len(other) < 1350
    assert music[7][0].equal(plain[7][0])
    for i in range(3000):
        assert music.labels(i) == plain.labels(i)  # what is mentioned is not compared
        assert (music.labels(i).mentioned == plain.labels(i).mentioned) or i in other
    random, words = np.random.default_rng(0), Counter()
    for i in other:
        text, labels = music.text(i), music.labels(i)
        assert {*labels.mentioned} <= {'instrument', 'tempo', 'mode', 'register', 'texture', 'drums'}
        assert labels.mentioned
        for told, means in OUTRIGHT.items():
            if re.search(rf'\b{told}\b', text):
                words[told] += 1
                assert all(getattr(labels, name) == value for name, value in means.items()), (text, labels)
    assert min(words.values()) > 0
    assert len(words) > 3
    # of sampled instruments, some of which the eight are not
    for _ in range(300):
        labels = MusicLabels.draw(random, SAMPLED_ATTRIBUTES)
        _, meaning = draw_prompt(random, labels=labels)
        assert all(getattr(labels, name) == value for name, value in meaning.items())
    # what was computed of a data set before there was a share is of the same data; of another share it is not
    assert 'everyday' not in fingerprint_data(plain)
    assert fingerprint_data(music)['everyday'] == 0.4
    with pytest.raises(ValueError, match=r'everyday must lie in \[0, 1\], got 1.5'):
        SyntheticMusic(everyday=1.5)


def test_no_word_said_outright_has_two_meanings():
    for table in ('adjectives', 'phrases', 'nouns'):
        counts = Counter(chain(*(row['words'] for row in everyday_words()[table])))
        assert counts.most_common(1)[0][1] == 1, table


def test_instruments_that_there_are_not_are_never_meant():
    random = np.random.default_rng(1)
    instruments = [draw_prompt(random, EIGHT)[1].get('instrument') for _ in range(2000)]
    assert set(instruments) == {None, *ATTRIBUTES['instrument']}


def test_plain_captions_tell_the_meaning_and_nothing_else():
    random = np.random.default_rng(2)
    texts = plain_captions(random, dict(tempo='slow', mode='minor'), 50, ATTRIBUTES)
    slow = ('slow', 'unhurried', 'leisurely')
    for text in map(str.lower, texts):
        both = any(word in text for word in ('sad', 'mournful', 'sorrowful', 'melancholy'))
        assert both or ('minor' in text and any(word in text for word in slow)), text
        assert not any(
            name in text for name in ('drum', 'percussion', 'piano', 'flute', 'register', 'pitch', 'melody ')
        )


def test_what_is_usual_gives_way_and_nothing_is_meant_that_no_instrument_plays():
    random, calm = np.random.default_rng(5), Counter()
    for _ in range(6000):
        text, meaning = draw_prompt(random)
        if re.search(r'\b(calm|soothing|sad|lonely)\b', text):
            calm[meaning['drums']] += 1
        instrument, register = meaning.get('instrument'), meaning.get('register')
        assert instrument is None or register is None or register in SAMPLED[instrument], (text, meaning)
        if instrument == 'choir':
            assert not re.search('(no|without) (vocals|singing|words)', text)
    assert calm[False] > 2 * calm[True] > 10


def captions(count: int, seed: int) -> list[str]:
    """Of SyntheticMusic, played by sampled instruments."""
    random, shares = np.random.default_rng(seed), check_shares({})
    labels = [MusicLabels.draw(random, SAMPLED_ATTRIBUTES) for _ in range(count)]
    return [write_caption(it, draw_mentions(random, shares), 'train', random) for it in labels]


@pytest.fixture(scope='module')
def trained() -> MuLaN:
    """A MuLaN with embeddings of the words of plain captions alone."""
    torch.manual_seed(0)
    mulan = tiny_mulan(text=dict(num_tokens=VOCAB_SIZE, max_seq_len=64))
    mulan.train().get_text_latents(raw_texts=captions(300, seed=3)).sum().backward()
    return with_trained_words(mulan.eval()).eval()


def test_new_words_come_to_lie_where_what_they_mean_does(trained):
    known = {'zesty': 'a fast melody', 'doleful': 'a slow piece in minor', 'thumping': 'a piece with drums'}
    keep, near = captions(2000, seed=4), []
    pairs, how = [(new, [same]) for new, same in known.items()], dict(steps=400, batch_size=33, lr=1e-3)
    taught = teach_words(trained, pairs, keep, **how, report=lambda _, it: near.append(it))
    careless = teach_words(trained, pairs, list(known.values()), **how)
    assert len(near) == 4
    assert near[0] < near[-1] > 0.98
    assert taught.text.unknown_words('zesty xylophone') == ['xylophone']
    assert all(map(trained.text.unknown_words, known))
    with torch.no_grad():
        wanted = trained.get_text_latents(raw_texts=list(known.values()))
        new, before = (it.get_text_latents(raw_texts=list(known)) for it in (taught, trained))
        assert F.cosine_similarity(new, wanted).min() > 0.98 > F.cosine_similarity(before, wanted).min()
        # unknown words in between change little
        texts = [f'{word} xylophone' for word in known]
        assert F.cosine_similarity(taught.get_text_latents(raw_texts=texts), wanted).min() > 0.98
        # so do captions that no pair names, such as keys and beats per minute
        others = captions(200, seed=5)
        ours, lost, theirs = (it.get_text_latents(raw_texts=others) for it in (taught, careless, trained))
    kept, not_kept = (F.cosine_similarity(it, theirs).mean() for it in (ours, lost))
    assert kept > 0.9 > 0.8 > not_kept
    ours, theirs = taught.audio.state_dict(), trained.audio.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_the_same_seed_teaches_the_same_and_what_was_frozen_stays_so(trained):
    pairs, keep, how = [('zesty', ['a fast melody'])], captions(20, seed=4), dict(steps=2, batch_size=1)
    trained.audio.requires_grad_(False)
    one, other, third = (teach_words(trained, pairs, keep, **how, seed=seed) for seed in (1, 1, 2))
    weights, same, others = (it.text.state_dict() for it in (one, other, third))
    assert all(torch.equal(weights[name], same[name]) for name in weights)
    assert not torch.equal(weights['token_emb.weight'], others['token_emb.weight'])
    assert not any(it.requires_grad for it in one.audio.parameters())
    assert all(it.requires_grad for it in one.text.parameters())
    trained.audio.requires_grad_(True)


def test_a_tower_of_all_words_learns_and_its_record_stays_true():
    torch.manual_seed(0)
    mulan = tiny_mulan(text=dict(num_tokens=VOCAB_SIZE, max_seq_len=8, pad_id=7)).eval()
    taught = teach_words(mulan, [('zesty', ['a fast melody'])], captions(20, seed=4), steps=2, batch_size=3)
    assert taught.text.unknown_words('a loud zesty piano') == []  # nobody knows, as before
    mulan.text.trained_tokens[mulan.text.tokenize(['a fast melody'])] = True
    taught = teach_words(mulan, [('zesty', ['a fast melody'])], ['a melody'], steps=2, batch_size=3)
    assert taught.text.unknown_words('a loud zesty melody') == ['loud']


def test_a_quantizer_by_recipe_is_of_a_mulan_that_knows_ordinary_words(trained, tmp_path):
    words, tokens = dict(steps=2, batch_size=4, prompts=2000), dict(synthetic_sound_font='some.sf2')
    recipe = MusicLMRecipe.from_content(dict(words=words, tokens=tokens), 'recipe.yaml')
    assert recipe.to_dict()['words'] == words
    assert 'words' not in MusicLMRecipe().to_dict()
    assert recipe.with_seed(5).fitted.words['seed'] == 5
    fitted = FittedRecipe(words=words, tokens=tokens, quantizer=dict(rq_num_quantizers=2, codebook_size=4))
    clips = torch.utils.data.StackDataset(torch.randn(8, 16000), ['a piano'] * 8)
    quantizer, _ = fit_quantizer(fitted, trained, clips, [8, 8, 8])
    quantizer.save_pretrained(tmp_path)
    text = type(quantizer).from_pretrained(tmp_path).mulan.text
    assert text.unknown_words('a relaxing lo-fi beat for studying, with saxophone') == []
    assert 'relaxing' in trained.text.unknown_words('a relaxing lo-fi beat')


def test_what_cannot_be_taught_is_refused(trained, tmp_path):
    pairs, keep = [('zesty', ['a fast melody'])], ['a flute']
    with pytest.raises(TypeError, match='words are taught to a TextTransformer that reads strings'):
        teach_words(tiny_mulan(), pairs, keep)
    for wrong in (([], keep), (pairs, []), ([('zesty', [])], keep)):
        with pytest.raises(ValueError, match='some of these are empty'):
            teach_words(trained, *wrong)
    with pytest.raises(ValueError, match='steps must be greater than 0, got 0'):
        teach_words(trained, pairs, keep, steps=0)
    # before hours of training
    for data, words, wanted in (
        ('synthetic', dict(steps=0), "section 'words': steps must be greater than 0, got 0"),
        ('scores', dict(steps=2), 'leave the section out for other data than "synthetic"'),
    ):
        recipe = MusicLMRecipe.from_content(dict(words=words), 'recipe.yaml')
        with pytest.raises(ValueError, match=wanted):
            train_musiclm(data, tmp_path / 'out', recipe)
