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
        assert convert.AudioConditionerBase is AudioConditionerBase
        for name in ('AudioLM', 'SoundStream', 'EncodecWrapper', 'FineTransformerTrainer'):
            assert getattr(convert, name) is getattr(audiolm_pytorch, name)
        assert not hasattr(convert, 'novelty')
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


UNUSABLE = {  # what is imported as fairseq, and what the error says of it
    'failing': ('raise ValueError("mutable default for field common is not allowed")', 'mutable default'),
    'none': ('raise ModuleNotFoundError("No module named fairseq", name="fairseq")', 'No module named fairseq'),
    'without the function': ('', 'checkpoint_utils'),
}


@pytest.mark.slow
def test_imports_that_fail_are_undone_and_told_apart(tmp_path):
    """Of a fairseq that cannot be used, of something that audiolm-pytorch imports last, and of itself."""
    for name, (content, _) in UNUSABLE.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / 'fairseq.py').write_text(content)
    (tmp_path / 'absent').mkdir()
    (tmp_path / 'absent' / 'audiolm_pytorch.py').write_text(
        'raise ModuleNotFoundError("No module named audiolm_pytorch", name="audiolm_pytorch")'
    )
    reasons = {str(tmp_path / name): reason for name, (_, reason) in UNUSABLE.items()}
    program = f"""
        import logging, sys, warnings
        genuine = warnings.warn

        def error_of(*folders, absent=None):
            for name in [it for it in sys.modules if it.split('.')[0] in ('audiolm_pytorch', 'fairseq')]:
                del sys.modules[name]
            if absent:
                sys.modules[absent] = None  # makes its import fail
            sys.path[:0] = folders
            try:
                from musiclm_pytorch.audiolm.convert import AudioLM
            except ImportError as error:
                assert warnings.warn is genuine
                assert logging.root.level == logging.WARNING
                return error
            finally:
                del sys.path[:len(folders)]
            raise AssertionError('no error')

        for folder, reason in {reasons}.items():
            error = error_of(folder)
            assert reason in str(error), error
            assert 'pip install ./compat/fairseq' in str(error), error
        error = error_of(absent='audiolm_pytorch.trainer')
        assert error.name == 'audiolm_pytorch.trainer', error
        error = error_of({str(tmp_path / 'absent')!r})
        assert 'pip install "audiolm-pytorch>=2.4,<3"' in str(error), error
    """
    run(program)
