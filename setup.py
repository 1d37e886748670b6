"""Packaging. What a static table cannot say: where pip finds the fairseq stand-in on the installing machine."""

import hashlib
import os
import re
import tempfile
import zipfile
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent
VERSION = re.search(r"^__version__ = '(.+)'$", (ROOT / 'musiclm_pytorch/version.py').read_text(), re.M)[1]


def fairseq_stand_in():
    """The requirement that makes pip take compat/fairseq where audiolm-pytorch asks for fairseq.

    audiolm-pytorch requires and imports fairseq, whose last release neither builds with today's pip nor
    imports on Python >= 3.11. compat/fairseq is a small distribution of that name with just what
    audiolm-pytorch calls. pip wants an absolute URI for it, and writes that URI into the metadata of the
    installed package, where it reads it again whenever it resolves `musiclm-pytorch[some-extra]`, and into
    the wheel that it may keep in its cache. So the URI must outlive this build, which for an sdist or a git
    address runs in a folder that pip deletes: an archive in the user's cache folder, named by its content.
    """
    source = ROOT / 'compat' / 'fairseq'
    files = {
        path.relative_to(source).as_posix(): path.read_bytes()
        for path in sorted(source.rglob('*'))
        if path.suffix in {'.py', '.toml', '.md'} and 'build' not in path.relative_to(source).parts
    }
    digest = hashlib.sha256(repr(sorted(files.items())).encode()).hexdigest()[:16]
    try:
        cache = Path(os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache') / 'musiclm-pytorch'
        archive = cache / f'fairseq-{digest}.zip'
        if not archive.exists():
            cache.mkdir(parents=True, exist_ok=True)
            # written aside and renamed, so that another build at the same time never reads half a file
            handle, aside = tempfile.mkstemp(dir=cache)
            with open(handle, 'wb') as file, zipfile.ZipFile(file, 'w') as bundle:
                for name, content in files.items():
                    bundle.writestr(f'fairseq/{name}', content)
            os.replace(aside, archive)
    except (OSError, RuntimeError):  # no home folder, or one that may not be written to
        return f'fairseq @ {source.as_uri()}'
    return f'fairseq @ {archive.absolute().as_uri()}'


# One line an extra, and only extras whose code is in the package; `all` is their union.
EXTRAS = {
    'app': ['gradio>=6.29'],
    'docs': ['mkdocs-material>=9.6', 'mkdocstrings[python]>=0.29'],
    'eval': ['encodec>=0.1.1', 'hear21passt>=0.0.26', 'mir-eval>=0.8', 'transformers>=5'],
    'inference': ['onnx>=1.18', 'onnxruntime>=1.20', 'onnxscript>=0.5', 'torchao>=0.15'],
    'openclip': ['open-clip-torch>=3.3,<4'],
    'ray': ['ray>=2.40'],
    'scores': ['mido>=1.3', 'pyfluidsynth>=1.4'],  # and FluidSynth itself, which pip cannot install
    'search': ['faiss-cpu>=1.8'],
    'serve': ['fastapi>=0.115.12', 'pydantic>=2.6', 'python-multipart>=0.0.18', 'starlette>=0.46', 'uvicorn>=0.30'],
    'shards': ['webdataset>=0.2.100'],
    'test': [
        'pytest>=8',
        'pytest-xdist>=3.5',
        'hypothesis>=6.100',
        'faiss-cpu>=1.8',
        'fastapi>=0.115.12',
        'gradio>=6.29',
        'httpx>=0.27',
        'import-linter>=2.6',
        'mido>=1.3',
        'mir-eval>=0.8',
        'mypy>=1.15',
        'onnx>=1.18',
        'onnxruntime>=1.20',
        'onnxscript>=0.5',
        'open-clip-torch>=3.3,<4',
        'playwright>=1.49',
        'pydantic>=2.6',
        'pyfluidsynth>=1.4',
        'python-multipart>=0.0.18',
        'ruff>=0.12',
        'starlette>=0.46',
        'torchao>=0.15',
        'uvicorn>=0.30',
        'webdataset>=0.2.100',
    ],
}

setup(
    name='musiclm-pytorch',
    version=VERSION,
    description='MusicLM in PyTorch: text to music, and MuLaN, the joint embedding of music and text',
    long_description=(ROOT / 'README.md').read_text(encoding='utf-8'),
    long_description_content_type='text/markdown',
    license='MIT',
    python_requires='>=3.10',
    packages=find_packages(include=['musiclm_pytorch', 'musiclm_pytorch.*']),
    entry_points={'console_scripts': ['musiclm = musiclm_pytorch.cli:run']},
    package_data={
        'musiclm_pytorch': [
            'py.typed',
            '**/*.pyi',
            'data/*.yaml',
            'data/scores/*.yaml',
            'inference/package_files/*',
            'trainer/shipped_recipes/*.yaml',
            'pretrained/*/*',
            'pretrained/*/*/*',
            'pretrained/*/*/*/*',
            'pretrained/*/*/*/*/*',
        ]
    },
    install_requires=[
        'accelerate>=1.0',
        'argcomplete>=3.5',
        'audiolm-pytorch>=2.4.0,<3',
        'av>=16',
        'beartype>=0.18',
        'cloudpickle>=3',
        'einops>=0.8',
        'ema-pytorch>=0.7',
        'filelock>=4',
        'huggingface-hub>=0.34',
        'hyper-connections>=0.4.11,<0.5',
        'lazy-loader>=0.6',
        'librosa>=0.11',
        'lion-pytorch>=0.2',
        'matplotlib>=3.8',
        'numba>=0.61',
        'packaging>=22',
        'pyloudnorm>=0.2',
        'pyyaml>=6',
        'safetensors>=0.4.3',
        'scikit-learn>=1.3',
        'scipy>=1.11',
        'soundfile>=0.12',
        'tensorboard>=2.15',
        # Our own code imports neither torchaudio nor torchvision, but audiolm-pytorch imports torchaudio: 2.11.0 loads
        # beside torch 2.11 to 2.14, which are for the same CUDA; 2.11.1 does not beside 2.11. Neither says so: nothing
        # but these bounds keeps pip from mixing them.
        'torch>=2.11,<2.15',
        'torchaudio>=2.11,<2.11.1',
        'torchvision>=0.26',  # x-clip requires it
        'tqdm>=4.60',
        'typing-extensions>=4.10',
        'transformers>=5',
        'vector-quantize-pytorch>=1.20',
        'wandb>=0.19.10',  # audiolm-pytorch requires it; several runs in one process
        'x-clip>=0.14',
        'xxhash>=3',
        fairseq_stand_in(),
    ],
    extras_require={**EXTRAS, 'all': sorted({need for needs in EXTRAS.values() for need in needs})},
    keywords=['artificial intelligence', 'deep learning', 'transformers', 'music', 'contrastive learning'],
    classifiers=[
        'Development Status :: 4 - Beta',
        'Intended Audience :: Developers',
        'Intended Audience :: Science/Research',
        'Programming Language :: Python :: 3.10',
        'Programming Language :: Python :: 3.11',
        'Programming Language :: Python :: 3.12',
        'Topic :: Multimedia :: Sound/Audio',
        'Topic :: Scientific/Engineering :: Artificial Intelligence',
    ],
)
