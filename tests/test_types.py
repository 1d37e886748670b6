"""What a type checker, and an editor, see of the package."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import musiclm_pytorch

PACKAGE = Path(musiclm_pytorch.__file__).parent

SCRIPT = """
import musiclm_pytorch
from musiclm_pytorch import MuLaN, MuLaNTrainer, MusicLM
from musiclm_pytorch.evaluation import frechet_distance

reveal_type(MuLaN.__init__)
reveal_type(MusicLM.from_pretrained('tiny'))
reveal_type(musiclm_pytorch.trainer.MuLaNTrainer)
reveal_type(frechet_distance)
MuLaN(dim_latents=3)
musiclm_pytorch.MuLan
"""
# other packages are not looked at: that takes a minute, and is theirs
OTHERS = (
    'torch torchaudio transformers sklearn accelerate audiolm_pytorch matplotlib numba scipy numpy einops av librosa'
)
SETTINGS = f"""
[mypy]
ignore_missing_imports = True
follow_imports = silent
[mypy-{','.join(f'{name}.*' for name in OTHERS.split())}]
follow_imports = skip
"""


@pytest.mark.slow
def test_a_users_script_sees_real_types(tmp_path):
    (tmp_path / 'user.py').write_text(SCRIPT)
    (tmp_path / 'mypy.ini').write_text(SETTINGS)
    assert (PACKAGE / 'py.typed').exists()  # without it no checker reads an installed package
    # mypy does not see what an editable installation reaches by an import hook
    checked = subprocess.run(
        [sys.executable, '-m', 'mypy', '--config-file', 'mypy.ini', 'user.py'],
        cwd=tmp_path,
        env=os.environ | dict(MYPYPATH=str(PACKAGE.parent)),
        capture_output=True,
        text=True,
    )
    told = checked.stdout
    assert 'audio_transformer: musiclm_pytorch.mulan.audio_transformer.AudioSpectrogramTransformer' in told, checked
    assert 'Revealed type is "musiclm_pytorch.musiclm.MusicLM"' in told
    assert "'batch_size'?: int | None" in told
    assert re.search('Revealed type is "def .a: musiclm_pytorch.evaluation.distances.GaussianStatistics', told)
    assert 'Unexpected keyword argument "dim_latents" for "MuLaN"' in told
    assert 'Module has no attribute "MuLan"' in told
