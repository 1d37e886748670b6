"""The page: what is on it is what was given, and what is there is kept."""

import html.parser
import resource

import numpy as np
import pytest
import soundfile
import torch

from musiclm_pytorch.gallery import Clip, file_name, log_mel, picture, ranked_clips, write_gallery

RATE = 8000


class Page(html.parser.HTMLParser):
    """Files that a page names, and its text."""

    def __init__(self, text):
        super().__init__()
        self.files, self.text = [], ''
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.files += [value for name, value in attributes if name == 'src']

    def handle_data(self, data):
        self.text += data


def test_a_page_shows_and_plays_its_clips(tmp_path):
    waves = 0.3 * torch.randn(2, RATE)
    waves[1, 5] = 3.0
    clips = [
        Clip('a', waves[0], 'slow <flute>', 'score 0.5', section='first & last', remark='not <lofi>'),
        Clip('b', waves[1], 'fast', section='first & last'),
    ]
    path = write_gallery(tmp_path / 'new' / 'page', clips, RATE, title='Music')
    page = Page(path.read_text())
    assert page.files == ['a.png', 'a.wav', 'b.png', 'b.wav']
    assert all((path.parent / name).stat().st_size > 1000 for name in page.files)
    for text in ('slow <flute>', 'score 0.5', 'Music', 'not <lofi>'):
        assert text in page.text
    assert page.text.count('first & last') == 1
    for name, wave in zip('ab', waves):
        heard, rate = soundfile.read(path.parent / f'{name}.wav')
        assert rate == RATE
        np.testing.assert_allclose(heard, wave.numpy() / max(1, float(wave.abs().max())), atol=1e-4)

    with pytest.raises(FileExistsError, match='is there already; give another folder'):
        write_gallery(path.parent, clips, RATE, title='Other')
    assert 'Music' in path.read_text()
    write_gallery(path.parent, clips[:1], RATE, title='Other', overwrite=True)
    assert 'Other' in path.read_text()


@pytest.mark.parametrize('rate', [8000, 16000, 24000, 44100])
def test_a_tone_is_a_line_at_its_place(rate):
    tone = torch.sin(2 * torch.pi * 1000 * torch.arange(rate) / rate)
    mel = log_mel(tone, rate)
    assert len(mel) == 128
    middle = mel[:, 20:-20]
    assert middle.max() > -1
    assert (middle.argmax(dim=0) == middle.argmax(dim=0)[0]).all()
    # on the Slaney scale 1,000 Hz are 15 mel, linear below
    top = 15 + 27 * np.log(rate / 2 / 1000) / np.log(6.4)
    assert abs(middle.argmax(dim=0)[0].item() - 128 * 15 / top) < 4


@pytest.mark.parametrize('wave', [torch.zeros(RATE), torch.randn(100)])
def test_silence_and_very_short_clips_have_a_picture(wave):
    mel = log_mel(wave, RATE)
    assert mel.isfinite().all()
    assert picture(wave, RATE).axes


def test_samples_stand_in_the_order_of_their_scores():
    waves = torch.arange(3.0)[:, None].repeat(1, 4)
    scores, seeds = torch.tensor([0.1, 0.7, -0.25]), torch.tensor([5, 6, 7])
    clips = ranked_clips('slow <flute>', waves, scores, seeds, name='flute', remark='no <lofi>')
    assert [clip.wave[0].item() for clip in clips] == [1, 0, 2]
    assert [clip.name for clip in clips] == ['flute-1', 'flute-2', 'flute-3']
    assert [clip.note for clip in clips] == [
        'MuLaN: 0.700 · seed 6',
        'MuLaN: 0.100 · seed 5',
        'MuLaN: -0.250 · seed 7',
    ]
    assert [clip.seed for clip in clips] == [6, 5, 7]
    assert {(clip.section, clip.remark) for clip in clips} == {('slow <flute>', 'no <lofi>')}


def test_a_file_is_there_whole_or_not_at_all(tmp_path):
    """On a disk that is full: here, no file may be longer than 20 kB."""
    clip = Clip('a', torch.zeros(20 * RATE), 'silence')
    write_gallery(tmp_path, [Clip('a', torch.zeros(100), 'silence')], RATE, title='First')
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(OSError, match=r'File too large: .*a\.wav'):
            write_gallery(tmp_path, [clip], RATE, title='Second', overwrite=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_file_names_are_safe():
    assert file_name('A "fast", happy/flute ../melody, please: now!') == 'a-fast-happy-flute-melody-please'
    assert file_name('♪') == 'music'
