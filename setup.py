"""Packaging. What a static table cannot say: where the fairseq stand-in lies on the installing machine."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent
VERSION = re.search(r"^__version__ = '(.+)'$", (ROOT / 'musiclm_pytorch/version.py').read_text(), re.M)[1]

# audiolm-pytorch requires and imports fairseq, whose last release neither builds with today's pip nor
# imports on Python >= 3.11. compat/fairseq is a small distribution of that name with just what
# audiolm-pytorch calls; pip wants an absolute URI for it, known only where the checkout lies.
FAIRSEQ_STAND_IN = f'fairseq @ {(ROOT / "compat" / "fairseq").as_uri()}'

EXTRAS = {
    'test': ['pytest>=8', 'hypothesis>=6.100', 'ruff>=0.9'],
}

setup(
    name='musiclm-pytorch',
    version=VERSION,
    description='MusicLM in PyTorch: the MuLaN text-audio model and text-to-music generation',
    long_description=(ROOT / 'README.md').read_text(encoding='utf-8'),
    long_description_content_type='text/markdown',
    license='MIT',
    python_requires='>=3.10',
    packages=find_packages(include=['musiclm_pytorch', 'musiclm_pytorch.*']),
    package_data={'musiclm_pytorch': ['py.typed']},
    install_requires=[
        'accelerate>=1.0',
        'audiolm-pytorch>=2.4.0,<3',
        'beartype>=0.18',
        'einops>=0.8',
        'ema-pytorch>=0.7',
        'lion-pytorch>=0.2',
        'safetensors>=0.4.3',
        'soundfile>=0.12',
        'torch>=2.6,<2.12',  # torchaudio ends at 2.11 and refuses to import beside a newer torch
        'torchaudio>=2.6,<2.12',
        'tqdm>=4.60',
        'vector-quantize-pytorch>=1.20',
        'x-clip>=0.14',
        FAIRSEQ_STAND_IN,
    ],
    extras_require={**EXTRAS, 'all': sorted({need for needs in EXTRAS.values() for need in needs})},
    keywords=['artificial intelligence', 'deep learning', 'transformers', 'text to music', 'contrastive learning'],
    classifiers=[
        'Development Status :: 4 - Beta',
        'Intended Audience :: Developers',
        'Intended Audience :: Science/Research',
        'License :: OSI Approved :: MIT License',
        'Programming Language :: Python :: 3.10',
        'Programming Language :: Python :: 3.11',
        'Programming Language :: Python :: 3.12',
        'Topic :: Multimedia :: Sound/Audio',
        'Topic :: Scientific/Engineering :: Artificial Intelligence',
    ],
)
