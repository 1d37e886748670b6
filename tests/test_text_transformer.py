import copy

import pytest
import torch
from helpers.models import tiny_mulan, tiny_text

from musiclm_pytorch import MuLaN, TextTransformer
from musiclm_pytorch.mulan.text_transformer import VOCAB_SIZE


@pytest.fixture(scope='module')
def words():
    torch.manual_seed(0)
    return TextTransformer(dim=16, depth=2, heads=2, dim_head=8, max_seq_len=12).eval()


def test_padding_changes_nothing():
    tower = tiny_text().eval()
    ids = torch.randint(1, 100, (2, 7))
    torch.testing.assert_close(tower(torch.nn.functional.pad(ids, (0, 5))), tower(ids), atol=1e-6, rtol=1e-5)
    masked = tower(torch.cat([ids, ids], dim=1)[:, :9], mask=torch.arange(9).expand(2, 9) < 7)
    torch.testing.assert_close(masked, tower(ids), atol=1e-6, rtol=1e-5)


def test_strings_are_embedded_like_their_ids(words):
    from x_clip.tokenizer import tokenizer

    assert tokenizer.vocab_size == VOCAB_SIZE
    texts = ['a slow piano', 'drums']
    torch.testing.assert_close(words(raw_texts=texts), words(tokenizer.tokenize(texts)))
    torch.testing.assert_close(words(raw_texts=texts)[1:], words(raw_texts=texts[1:]), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    'text', ['', '   ', '🎹🎶', 'музыка', '音楽', 'موسيقى', '\n\t\x00', 'café ｆｕｌｌｗｉｄｔｈ', '&amp;<b>']
)
def test_any_string_has_a_finite_embedding(words, text):
    embeds = words(raw_texts=[text, 'a flute'])
    assert embeds.shape == (2, 16)
    assert embeds.isfinite().all()
    torch.testing.assert_close(words(raw_texts=[text]), embeds[:1], atol=1e-6, rtol=1e-5)


def test_long_prompts_are_cut_with_one_warning():
    tower = TextTransformer(dim=16, depth=1, heads=2, dim_head=8, max_seq_len=12).eval()
    ids = torch.randint(1, 100, (2, 30))
    with pytest.warns(UserWarning, match='a text of 30 tokens is cut to the context of 12') as caught:
        embeds = tower(ids)
        of_string = tower(raw_texts=['la ' * 20])
    assert len(caught) == 1
    assert caught[0].filename == __file__
    torch.testing.assert_close(embeds, tower(ids[:, :12]))
    torch.testing.assert_close(of_string, tower(raw_texts=['la ' * 12]))


@pytest.mark.parametrize('dtype', [torch.uint8, torch.int8, torch.int16, torch.int32])
def test_ids_of_any_integer_type(words, dtype):
    ids = torch.tensor([[5, 6, 7]])
    torch.testing.assert_close(words(ids.to(dtype)), words(ids))


@pytest.mark.parametrize(
    ('arguments', 'error', 'message'),
    [
        (dict(), ValueError, 'got neither'),
        (dict(x=torch.ones(1, 3).long(), raw_texts=['a']), ValueError, 'got both'),
        (dict(x=torch.ones(2, 3)), TypeError, 'texts must be an integer tensor .* got torch.float32'),
        (dict(x=torch.ones(2, 3, dtype=torch.bool)), TypeError, 'got torch.bool'),
        (dict(x='a song'), TypeError, 'got str; strings go into raw_texts'),
        (dict(x=torch.ones(3).long()), ValueError, r'shape \(batch, tokens\)'),
        (dict(x=torch.ones(0, 3).long()), ValueError, r'at least one text, got \(0, 3\)'),
        (dict(x=torch.tensor([[1, 100]])), ValueError, 'token id 100 is outside the vocabulary of 100 ids'),
        (dict(x=torch.tensor([[-1, 1]])), ValueError, 'token id -1 is outside'),
        (dict(raw_texts='a song'), TypeError, "list of strings, got 'a song'; put one text in a list"),
        (dict(raw_texts=['a', 3]), TypeError, 'list of strings'),
        (dict(raw_texts=[]), ValueError, 'raw_texts is an empty list'),
        (dict(raw_texts=['a song']), ValueError, 'raw_texts needs num_tokens=49408'),
        (dict(x=torch.ones(2, 3).long(), mask=torch.ones(2, 4).bool()), ValueError, r'mask must be a bool tensor'),
        (dict(x=torch.ones(1, 2).long(), mask=[[True, True]]), TypeError, 'mask must be a bool tensor .*, got list'),
    ],
)
def test_bad_input(arguments, error, message):
    with pytest.raises(error, match=message):
        tiny_text()(**arguments)


def test_a_small_vocabulary_reads_its_words_as_the_large_one(words):
    ids = words.tokenize(['slow piano', 'a fast flute'])
    small = words.with_known_tokens(ids[ids > 0].unique().tolist())
    assert small.token_emb.weight.shape == (len(ids[ids > 0].unique()) + 1, 16)
    assert not small.training
    with torch.no_grad():
        torch.testing.assert_close(small(raw_texts=['slow piano', 'a fast flute']), words(ids), atol=1e-6, rtol=1e-5)
        # all other words are one word
        unknown = small(raw_texts=['slow guitar', 'slow organ', 'slow piano'])
        assert torch.equal(unknown[0], unknown[1])
        assert not torch.allclose(unknown[0], unknown[2], atol=1e-3)
    rebuilt = TextTransformer(**small.config)
    rebuilt.load_state_dict(small.state_dict())
    assert torch.equal(rebuilt.rows, small.rows)
    assert torch.equal(TextTransformer(dim=8, depth=1, known_tokens=[3, 1]).token_emb.weight[-1], torch.zeros(8))
    with pytest.raises(ValueError, match='was built with known_tokens already'):
        small.with_known_tokens([1])


def test_words_that_were_never_trained_are_not_known(tmp_path):
    def train(mulan, *texts):
        mulan(torch.randn(len(texts), 1500), raw_texts=list(texts)).backward()

    mulan = tiny_mulan(dict(depth=1), dict(depth=1, num_tokens=VOCAB_SIZE))
    prompt = "a calm piano, the singer's hi-hats don't rush: xqzvw флейта"
    mulan(torch.randn(2, 1500), raw_texts=['calm', 'rush'])  # without a gradient nothing is learned
    mulan.get_text_latents(raw_texts=['calm'])
    assert mulan.text.unknown_words(prompt) == []  # nothing was learned, or in a way that nobody knows of
    train(mulan, 'a slow piano', 'hi, hats: a singer! do')
    assert mulan.text.unknown_words(prompt) == ['calm', "don't", 'rush', 'xqzvw', 'флейта']
    assert mulan.text.unknown_words('A slow SINGER, please') == []
    assert 'reads 49408 tokens, 10 of them known' in repr(mulan)

    # it is saved beside the weights, and training goes on with it
    mulan.save_pretrained(tmp_path)
    again = MuLaN.from_pretrained(tmp_path)
    assert again.text.unknown_words(prompt) == mulan.text.unknown_words(prompt)
    again.get_text_latents(raw_texts=['calm', 'slow флейта']).sum().backward()
    assert again.text.unknown_words(prompt) == ["don't", 'rush', 'xqzvw']
    assert copy.deepcopy(again).text.unknown_words(prompt) == ["don't", 'rush', 'xqzvw']
    ids = again.text.tokenize(['slow calm rush']).unique().tolist()
    assert again.text.with_known_tokens(ids).unknown_words('calm slow piano, rush') == ['piano', 'rush']

    # of weights from elsewhere nobody knows, whatever they are trained on afterwards
    mulan.load_state_dict(again.state_dict())
    train(mulan, 'a flute', 'an organ')
    assert mulan.text.unknown_words(prompt) == []
    mulan.save_pretrained(tmp_path)
    assert MuLaN.from_pretrained(tmp_path).text.trained_tokens is None


@pytest.mark.parametrize('known', [[], [1, 1], [-1], [VOCAB_SIZE]])
def test_known_tokens_are_different_ids(known):
    with pytest.raises(ValueError, match='known_tokens must be one or more different ids from 0 to 49407'):
        TextTransformer(dim=8, depth=1, known_tokens=known)
