"""Packaging of the stand-in. Its version is fairseq's last release with a local label, so that it sorts as
that release for whoever pins it and still says what it is in `pip list`."""

from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).resolve().parent

setup(
    name='fairseq',
    version='0.12.2+musiclm.1',
    description="A stand-in for fairseq: HuBERT features from fairseq checkpoints, on transformers' HuBERT",
    long_description=(ROOT / 'README.md').read_text(encoding='utf-8'),
    long_description_content_type='text/markdown',
    license='MIT',
    python_requires='>=3.10',
    packages=['fairseq'],
    install_requires=['torch>=2.6', 'transformers>=4.40'],
)
