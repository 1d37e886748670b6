"""A folder to deploy: models, how to run them, which versions of what, a command line, examples and a README."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
import re
import shutil
from pathlib import Path
from string import Template

import soundfile

from musiclm_pytorch.atomic import parsed_json, write_json, write_text, written_together
from musiclm_pytorch.checks import typechecked
from musiclm_pytorch.data.synthetic import SyntheticMusic
from musiclm_pytorch.inference.batches import check_words, window_and_hop
from musiclm_pytorch.inference.config import InferenceConfig
from musiclm_pytorch.inference.engine import mulan_of
from musiclm_pytorch.mulan.model import MuLaN
from musiclm_pytorch.musiclm import MusicLM
from musiclm_pytorch.version import __version__

PACKAGE_FILE = 'package.json'
CONFIG_FILE = 'inference_config.json'
FORMAT = 'musiclm-pytorch deployment package'
# what goes into packages; .txt, since these are no modules of the library
FILES = Path(__file__).parent / 'package_files'
NAME = re.compile(r'[A-Za-z0-9][A-Za-z0-9_.-]*')
CLIPS, CLIP_SECONDS, CLIP_RATE = 3, 5.0, 16000  # music for the examples


class DeploymentPackager:
    """Writes models as a folder that runs wherever musiclm-pytorch is installed.

        packager = DeploymentPackager(InferenceConfig(batch_size = 4))
        packager.create_deployment_package({'mulan': mulan}, 'package')
        # python package/inference.py rank "slow piano" music/*.wav

    Args:
        config: how the package runs its models; it goes into the package. Of a MusicLM it optimizes the MuLaN where
            that embeds files and texts; to generate music, only device, `batch_size` and `memory_efficient` count.
    """

    @typechecked
    def __init__(self, config: InferenceConfig | None = None):
        self.config = InferenceConfig() if config is None else config

    @typechecked
    def create_deployment_package(
        self,
        models: dict,
        package_path: str | Path,
        include_examples: bool = True,
        *,
        overwrite: bool = False,
    ) -> Path:
        """Write a package, atomically: nothing half-written ever has its name.

        The folder holds `models/NAME` (safetensors and JSON, as `save_pretrained` writes them), `inference.py` with
        the commands `embed`, `rank` and `generate`, `inference_config.json`, `package.json` (what the models are),
        `requirements.txt` with the versions installed here, `README.md` and, with `include_examples`, `examples` that
        run on synthetic music beside them.

        Args:
            models: one `MuLaN` or `MusicLM` a name, which becomes the name of a folder.
            package_path: the folder, which must not exist yet.
            include_examples: add an example for each model, and three clips with captions.
            overwrite: replace a package that is there. A folder that is no package is never replaced.

        Returns:
            the path of the folder, absolute.

        Raises:
            TypeError: a model of another kind. ValueError: no models, a name that is none for a folder, or a model
                that the package could not run. FileExistsError: something is there already. ImportError:
                `use_quantization = True` without torchao, or musiclm-pytorch is not installed.
        """
        path = Path(package_path).resolve()
        check_models(models, include_examples)
        check_place(path, overwrite)
        pins = pinned_requirements(self.config)

        with written_together(path.parent) as aside:
            self._write(models, aside / path.name, pins, include_examples)
        return path

    def _write(self, models: dict[str, MuLaN | MusicLM], folder: Path, pins: str, include_examples: bool) -> None:
        about = {name: facts_of(model) for name, model in models.items()}
        for name, model in models.items():
            model.save_pretrained(folder / 'models' / name)
        self.config.to_json(folder / CONFIG_FILE)
        content = dict(format=FORMAT, version=1, musiclm_pytorch=__version__, models=about)
        write_json(folder / PACKAGE_FILE, content)
        write_text(folder / 'requirements.txt', pins)
        shutil.copyfile(FILES / 'inference.py.txt', folder / 'inference.py')
        if include_examples:
            write_examples(about, folder / 'examples')
        write_text(folder / 'README.md', readme(about, include_examples))


# What comes in


def check_models(models: dict, include_examples: bool) -> None:
    """Raise TypeError and ValueError unless a package could run each model."""
    if not models:
        raise ValueError("models is empty; pass one model or more by name, such as {'mulan': mulan}")
    for name, model in models.items():
        if not isinstance(name, str):
            raise TypeError(f'names of models must be strings, got {name!r}')
        if not NAME.fullmatch(name) or name.endswith('.'):
            raise ValueError(f'{name!r} cannot be the name of a folder everywhere; use letters, digits, "_" and "-"')
        if not isinstance(model, (MuLaN, MusicLM)):
            raise TypeError(
                f'models[{name!r}] must be a MuLaN or a MusicLM, got a {type(model).__name__}; of an optimized or '
                'compiled model pass the one that it was made from, and say how to run it in the InferenceConfig'
            )
        for key, weight in model.named_parameters():
            if not weight.isfinite().all():
                raise ValueError(f'models[{name!r}] cannot be used: its weight {key} holds NaN or infinity')
        try:
            check_usable(model, include_examples)
        except ValueError as error:
            raise ValueError(f'models[{name!r}]: {error}') from error
    if len({name.lower() for name in models}) < len(models):
        raise ValueError(f'names of models must differ in more than upper and lower case, got {list(models)}')


def check_usable(model: MuLaN | MusicLM, include_examples: bool) -> None:
    """Raise ValueError unless the commands, and the examples if wanted, work with a model."""
    mulan, generates = mulan_of(model), isinstance(model, MusicLM)
    if generates:
        model.check_fitted()
    if mulan.audio.accept_spec or mulan.sample_rate is not None:  # else the command is told the rate
        window_and_hop(mulan, None, None)
    if generates or include_examples:
        check_words(mulan, '' if generates else '; or pass include_examples=False')


def facts_of(model: MuLaN | MusicLM) -> dict[str, str | int | None]:
    """What `package.json` tells of a model: rates, in Hz, of the waves it makes or takes, and that its MuLaN takes."""
    return dict(
        kind='MusicLM' if isinstance(model, MusicLM) else 'MuLaN',
        parameters=sum(weight.numel() for weight in model.parameters()),
        sample_rate=model.sample_rate,
        mulan_sample_rate=mulan_of(model).sample_rate,
    )


# Where it goes


def check_place(path: Path, overwrite: bool) -> None:
    """Raise FileExistsError unless a package may be written there."""
    if not path.exists():
        return
    if not overwrite:
        raise FileExistsError(f'{path} is there already; give another path, or overwrite=True to replace a package')
    if not is_package(path):
        raise FileExistsError(f'{path} is not a deployment package, so it is not replaced; give another path')


def is_package(path: Path) -> bool:
    """Whether a folder was written by `DeploymentPackager`."""
    try:
        content = parsed_json((path / PACKAGE_FILE).read_text(encoding='utf-8'))
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and content.get('format') == FORMAT


# What goes in


def pinned_requirements(config: InferenceConfig) -> str:
    """The text of `requirements.txt`: all that musiclm-pytorch needs, in turn, in the versions installed here.

    What is needed on one platform only, such as torch's CUDA libraries, is left to the packages that ask for it, so
    that the file serves on others. Local parts of versions (`+cpu`) are left out: they name a build, not a release.
    """
    from packaging.markers import default_environment
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    queue = [('musiclm-pytorch', '', 'the package')]
    if config.use_quantization is True or (config.use_quantization and importlib.util.find_spec('torchao')):
        queue.append(('torchao', '', 'use_quantization'))
    pins, missing, by_address, seen = {}, {}, set(), set()
    while queue:
        name, extra, user = queue.pop()
        if (name, extra) in seen:
            continue
        seen.add((name, extra))
        try:
            found = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError as error:
            if name in ('musiclm-pytorch', 'torchao'):
                raise ImportError(f'{user} needs {name}, which is not installed; install it, then package') from error
            missing[name] = user
            continue
        pins[name] = found.version.partition('+')[0]
        for need in map(Requirement, found.requires or []):
            if need.marker is not None:
                of_a_platform = re.search('platform|os_name', str(need.marker))
                if of_a_platform or not need.marker.evaluate(default_environment() | {'extra': extra}):
                    continue
            other = canonicalize_name(need.name)
            if need.url:
                by_address.add(other)
            queue += [(other, wanted, name) for wanted in ('', *need.extras)]
    own = f'musiclm-pytorch=={pins.pop("musiclm-pytorch")}'
    return '\n'.join(
        [
            f'# Versions installed where this package was made, on Python {platform.python_version()}.',
            '# musiclm-pytorch is installed from its own source: see README.md.',
            *(f'# {name} comes with {own}' for name in sorted(by_address)),
            *(f'# not installed there: {name}, which {user} asks for' for name, user in sorted(missing.items())),
            own,
            *(f'{name}=={version}' for name, version in sorted(pins.items()) if name not in by_address),
            '',
        ]
    )


def write_examples(about: dict[str, dict], folder: Path) -> None:
    """A script for each model, and clips with their captions in `music`."""
    music = SyntheticMusic(CLIPS, seconds=CLIP_SECONDS, sample_rate=CLIP_RATE, split='valid')
    (folder / 'music').mkdir(parents=True)
    captions = {}
    for index in range(CLIPS):
        wave, caption = music[index]
        name = f'clip_{index + 1}.wav'
        soundfile.write(folder / 'music' / name, wave.numpy(), CLIP_RATE, subtype='PCM_16')
        captions[name] = caption
    write_json(folder / 'music' / 'captions.json', captions)
    for name, facts in about.items():
        script = example_of(name, facts)
        template = Template((FILES / f'{script.split("_")[0]}.py.txt').read_text(encoding='utf-8'))
        write_text(folder / script, template.substitute(name=name, script=script))


def example_of(name: str, facts: dict) -> str:
    return f'generate_{name}.py' if facts['kind'] == 'MusicLM' else f'rank_{name}.py'


def readme(about: dict[str, dict], include_examples: bool) -> str:
    """The text of `README.md`."""
    rows, commands = [], []
    several = len(about) > 1
    for name, facts in about.items():
        rate = 'not known' if facts['sample_rate'] is None else f'{facts["sample_rate"]} Hz'
        rows.append(f'| `models/{name}` | {facts["kind"]} | {facts["parameters"]:,} | {rate} |')
        options = f' --model {name}' if several else ''
        if facts['kind'] == 'MusicLM':
            commands.append(f'python inference.py generate "slow piano music"{options} --seconds 10 -o piano.wav')
        if facts['mulan_sample_rate'] is None:
            options += f' --sample-rate {CLIP_RATE}'
        commands.append(f'python inference.py rank "slow piano music" a.wav b.wav{options}')
        commands.append(
            f'python inference.py embed a.wav b.wav --texts "slow piano music" "loud drums"{options} '
            f'-o {name}.safetensors'
        )
    parts = dict(rows='\n'.join(rows), commands='\n'.join(commands), rates='', examples='', examples_row='')
    if any(facts['mulan_sample_rate'] is None for facts in about.values()):
        parts['rates'] = (FILES / 'unknown_rate.md.txt').read_text(encoding='utf-8')
    kinds = {facts['kind'] for facts in about.values()}
    parts['kinds'] = ', '.join(sorted(kinds))
    parts['loads'] = ', '.join(f"`{facts['kind']}.from_pretrained('models/{name}')`" for name, facts in about.items())
    parts['musiclm'] = parts['generate'] = ''
    if 'MusicLM' in kinds:
        parts['musiclm'] = ' A MusicLM makes\nmusic from text; the MuLaN within it serves `rank` and `embed`, too.'
        parts['generate'] = (FILES / 'generate.md.txt').read_text(encoding='utf-8')
    if include_examples:
        scripts = '\n'.join(f'python examples/{example_of(name, facts)}' for name, facts in about.items())
        template = Template((FILES / 'examples.md.txt').read_text(encoding='utf-8'))
        parts['examples'] = template.substitute(scripts=scripts)
        parts['examples_row'] = '| `examples` | scripts to start from, and synthetic clips that they run on |\n'
    template = Template((FILES / 'README.md.txt').read_text(encoding='utf-8'))
    text = template.substitute(**parts, version=__version__, python=platform.python_version())
    return re.sub(r'\n{3,}', '\n\n', text).rstrip() + '\n'
