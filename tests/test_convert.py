"""audiolm-pytorch through `convert`: its names, none of the side effects of its import, no request to build a model.

What an import does shows only in a fresh program, so each test runs one, with several checks, for importing
audiolm-pytorch takes seconds.
"""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def run(program, **environment):
    """Runs a program from the root of the repository; its assertions fail the test."""
    result = subprocess.run(
        [sys.executable, '-c', textwrap.dedent(program)],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result


def test_ours_first(tmp_path):
    """The program's own settings stay, and models with text conditioning are built without any request."""
    program = """
        import logging, sys, warnings

        import musiclm_pytorch.audiolm
        assert not {'audiolm_pytorch', 'transformers', 'torchaudio'} & set(sys.modules), 'the package is not light'

        import transformers
        transformers.logging.set_verbosity_info()
        logging.basicConfig(level=logging.DEBUG)
        genuine = warnings.warn = lambda *args, genuine=warnings.warn, **keywords: genuine(*args, **keywords)

        import musiclm_pytorch.quantizer
        assert 'audiolm_pytorch' not in sys.modules
        from audiolm_pytorch import HubertWithKmeans, FairseqVQWav2Vec
        from musiclm_pytorch.audiolm import convert
        assert warnings.warn is genuine
        assert logging.root.level == logging.DEBUG
        assert transformers.logging.get_verbosity() == logging.INFO

        import audiolm_pytorch
        from audiolm_pytorch.utils import AudioConditionerBase
        assert warnings.warn is genuine
        for name in convert.NAMES:
            theirs = AudioConditionerBase if name == 'AudioConditionerBase' else getattr(audiolm_pytorch, name)
            assert getattr(convert, name) is theirs, name
        assert issubclass(musiclm_pytorch.quantizer.MuLaNEmbedQuantizer, AudioConditionerBase)

        # Any socket that is made or used from here on is a request.
        requests = []
        sys.addaudithook(lambda event, args: event.startswith('socket.') and requests.append((event, args)))

        sizes = {'dim': 32, 'depth': 1, 'heads': 2}
        fine = {'codebook_size': 8, 'num_coarse_quantizers': 1, 'num_fine_quantizers': 1}
        coarse = {'codebook_size': 8, 'num_coarse_quantizers': 1, 'num_semantic_tokens': 8}

        def build(**condition):
            convert.FineTransformer(**sizes, **fine, **condition)
            convert.CoarseTransformer(**sizes, **coarse, **condition)
            return convert.SemanticTransformer(**sizes, num_semantic_tokens=8, **condition)

        build(audio_text_condition=True)
        model = build(has_condition=True)
        assert model.proj_text_embed.weight.shape == (32, 768)
        assert not requests, requests

        # The T5 itself is still fetched when it is used (here it cannot be), and a failure leaves nothing behind.
        try:
            model.embed_text(['a violin'])
        except OSError:
            pass
        else:
            raise AssertionError('T5 cannot be there')
        requests.clear()
        assert build(has_condition=True).proj_text_embed.weight.shape == (32, 768)
        assert not requests, requests

        import socket
        socket.socket().close()
        assert requests, 'sockets go unnoticed; this test shows nothing'
    """
    run(program, HF_HUB_OFFLINE='1', HF_HOME=str(tmp_path))


@pytest.mark.slow
def test_audiolm_pytorch_first(tmp_path):
    """What audiolm_pytorch left behind in a program that imported it goes back to the defaults; what the program
    has set since stays."""
    program = """
        import logging, os, sys, warnings
        genuine = warnings.warn

        from audiolm_pytorch import FairseqVQWav2Vec
        from audiolm_pytorch import HubertWithKmeans
        import transformers
        silent = warnings.warn
        assert silent is not genuine, 'audiolm_pytorch does no harm any more; this test shows nothing'
        assert logging.root.level == transformers.logging.get_verbosity() == logging.ERROR

        import musiclm_pytorch
        from musiclm_pytorch.audiolm import convert
        assert warnings.warn is genuine
        assert logging.root.level == transformers.logging.get_verbosity() == logging.WARNING
        assert convert.HubertWithKmeans is HubertWithKmeans
        assert convert.FairseqVQWav2Vec is FairseqVQWav2Vec

        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter('always')
            warnings.warn('heard')
        assert [str(warning.message) for warning in caught] == ['heard']

        convert.SemanticTransformer(dim=32, depth=1, heads=2, num_semantic_tokens=8, audio_text_condition=True)

        # As in a program that asked for these levels after it imported audiolm_pytorch.
        del sys.modules['musiclm_pytorch.audiolm.convert']
        warnings.warn = silent
        logging.root.setLevel(logging.INFO)
        transformers.logging.set_verbosity_error()
        os.environ['TRANSFORMERS_VERBOSITY'] = 'error'
        import musiclm_pytorch.audiolm.convert
        assert warnings.warn is genuine
        assert logging.root.level == logging.INFO
        assert transformers.logging.get_verbosity() == logging.ERROR
    """
    run(program, HF_HUB_OFFLINE='1', HF_HOME=str(tmp_path))


@pytest.mark.parametrize(
    ('fairseq', 'reason'),
    [
        ('raise ValueError("mutable default for field common is not allowed")', 'mutable default'),
        ('raise ModuleNotFoundError("No module named fairseq", name="fairseq")', 'No module named fairseq'),
        ('', 'checkpoint_utils'),
    ],
    ids=['one that fails', 'none', 'one that lacks the function'],
)
def test_a_fairseq_that_cannot_be_used(fairseq, reason, tmp_path):
    (tmp_path / 'fairseq.py').write_text(fairseq)
    program = f"""
        import sys, warnings
        genuine = warnings.warn
        try:
            from musiclm_pytorch.audiolm.convert import AudioLM
        except ImportError as error:
            assert {reason!r} in str(error), error
            assert 'pip install ./compat/fairseq' in str(error), error
        else:
            raise AssertionError('no error')
        assert warnings.warn is genuine
    """
    run(program, PYTHONPATH=os.pathsep.join([str(tmp_path), os.environ.get('PYTHONPATH', '')]))


@pytest.mark.slow
def test_an_import_that_fails_halfway_is_undone_as_well(tmp_path):
    """And audiolm-pytorch's absence is told from that of something it imports."""
    (tmp_path / 'absent').mkdir()
    (tmp_path / 'absent' / 'audiolm_pytorch.py').write_text(
        'raise ModuleNotFoundError("No module named audiolm_pytorch", name="audiolm_pytorch")'
    )
    program = f"""
        import logging, sys, warnings
        genuine = warnings.warn
        sys.modules['audiolm_pytorch.trainer'] = None  # imported last; None makes that fail
        try:
            from musiclm_pytorch.audiolm.convert import AudioLM
        except ModuleNotFoundError as error:
            assert error.name == 'audiolm_pytorch.trainer', error
        else:
            raise AssertionError('no error')
        assert warnings.warn is genuine
        assert logging.root.level == logging.WARNING

        for name in [name for name in sys.modules if name.startswith('audiolm_pytorch')]:
            del sys.modules[name]
        sys.path.insert(0, {str(tmp_path / 'absent')!r})
        try:
            from musiclm_pytorch.audiolm.convert import AudioLM
        except ImportError as error:
            assert 'pip install "audiolm-pytorch>=2.4,<3"' in str(error), error
        else:
            raise AssertionError('no error')
    """
    run(program)
