"""Ordinary words: what they mean, and a MuLaN that is taught them."""

import re
from collections import Counter
from itertools import chain, cycle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.models import tiny_mulan

from musiclm_pytorch import MuLaN
from musiclm_pytorch.data.attributes import ATTRIBUTES, SAMPLED_ATTRIBUTES
from musiclm_pytorch.data.everyday import draw_prompt, plain_captions, vocabulary
from musiclm_pytorch.mulan.text_transformer import VOCAB_SIZE
from musiclm_pytorch.trainer.assembly import fit_quantizer, with_trained_words
from musiclm_pytorch.trainer.pipeline_recipe import FittedRecipe, MusicLMRecipe
from musiclm_pytorch.trainer.words import teach_everyday_words, teach_words

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
    names = [it.lstrip('*') for it in chain(*vocabulary()['instruments'].values())]
    for _ in range(12_000):
        text, meaning = draw_prompt(random, misspelt=0)
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


def test_no_word_said_outright_has_two_meanings():
    for table in ('adjectives', 'phrases', 'nouns'):
        counts = Counter(chain(*(row['words'] for row in vocabulary()[table])))
        assert counts.most_common(1)[0][1] == 1, table


def test_instruments_that_there_are_not_are_never_meant():
    random = np.random.default_rng(1)
    instruments = [draw_prompt(random, ATTRIBUTES['instrument'])[1].get('instrument') for _ in range(2000)]
    assert set(instruments) == {None, *ATTRIBUTES['instrument']}


def test_plain_captions_tell_the_meaning_and_nothing_else():
    random = np.random.default_rng(2)
    texts = plain_captions(random, dict(tempo='slow', mode='minor'), 50, ATTRIBUTES)
    both = ('sad', 'mournful', 'sorrowful', 'melancholy')
    assert all('minor' in it.lower() or any(word in it.lower() for word in both) for it in texts)
    assert not any(name in it.lower() for it in texts for name in ('drum', 'piano', 'register', 'high', 'melody,'))


@pytest.fixture(scope='module')
def trained() -> MuLaN:
    """A MuLaN with embeddings of the words of plain captions alone."""
    torch.manual_seed(0)
    mulan = tiny_mulan(text=dict(num_tokens=VOCAB_SIZE, max_seq_len=64))
    random = np.random.default_rng(3)
    texts = [plain_captions(random, draw_prompt(random)[1], 1, SAMPLED_ATTRIBUTES)[0] for _ in range(300)]
    mulan.train().get_text_latents(raw_texts=texts).sum().backward()
    return with_trained_words(mulan.eval()).eval()


def test_new_words_come_to_lie_where_what_they_mean_does(trained):
    known = {'zesty': 'a fast melody', 'doleful': 'a slow piece in minor', 'thumping': 'a piece with drums'}
    turns = cycle((new, [same]) for new, same in known.items())
    near = []
    taught = teach_words(
        trained,
        lambda _: next(turns),
        steps=300,
        batch_size=12,
        lr=3e-3,
        report=lambda _, cosine: near.append(cosine),
    )
    assert len(near) == 3
    assert near[0] < near[-1] > 0.9
    with torch.no_grad():
        wanted = trained.get_text_latents(raw_texts=list(known.values()))
        new, before = (it.get_text_latents(raw_texts=list(known)) for it in (taught, trained))
        kept = taught.get_text_latents(raw_texts=list(known.values()))
    assert F.cosine_similarity(new, wanted).min() > 0.9 > F.cosine_similarity(before, wanted).min()
    assert F.cosine_similarity(kept, wanted).min() > 0.95
    # an unknown word in between changes little
    with torch.no_grad():
        more = taught.get_text_latents(raw_texts=[f'{word} xylophone' for word in known])
    assert F.cosine_similarity(more, wanted).mean() > 0.85
    assert not any(map(taught.text.unknown_words, known))
    assert all(map(trained.text.unknown_words, known))
    assert taught.text.unknown_words('zesty xylophone') == ['xylophone']
    ours, theirs = taught.audio.state_dict(), trained.audio.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert all(it.requires_grad for it in taught.parameters())


def test_a_quantizer_by_recipe_is_of_a_mulan_that_knows_ordinary_words(trained, tmp_path):
    words, tokens = dict(steps=2, batch_size=4), dict(synthetic_sound_font='some.sf2')
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


def test_what_cannot_be_taught_is_refused(trained):
    with pytest.raises(TypeError, match='words are taught to a text tower of strings'):
        teach_everyday_words(tiny_mulan())
    with pytest.raises(ValueError, match='steps must be greater than 0, got 0'):
        teach_everyday_words(trained, steps=0)
