"""Models of our own and of `transformers`, from a folder or from the Hugging Face Hub, and our own to it.

No code of a repository is run, and no pickle is fetched.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from musiclm_pytorch.atomic import checksum_of_file, naming, open_modes, read_checked_json

ENCODER_FOLDER = 'encoder'
HUB_NAME = re.compile(r'[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*')
FILES = ('*.json', '*.safetensors', '*.txt', '*.md')  # what our folders hold
NO_CODE = dict(trust_remote_code=False)  # otherwise transformers asks, and runs a repository's code if told so
CONVERT = (
    'convert it with from_pretrained(...).save_pretrained(folder) of its class in transformers, beside it what '
    'prepares its inputs, and pass that folder'
)


def is_hub_name(source: str | Path) -> bool:
    """Whether something can only be the name of a repository on the Hub: `user/name`, and no path of this machine."""
    is_name = HUB_NAME.fullmatch(str(source)) is not None
    return is_name and not Path(source).exists() and not Path(source).parent.exists()


def find_folder(
    source: str | Path,
    revision: str | None = None,
    subfolder: str | None = None,
    files: Sequence[str] = FILES,
    local_only: bool = False,
) -> Path:
    """The folder of a model: one on disk, or that of a repository on the Hub, fetched or in its cache.

    Args:
        source: a folder, or `user/name`.
        revision: branch, tag or commit of the repository.
        subfolder: where the model lies within.
        files: patterns of what is fetched.
        local_only: take what is in the cache, and ask for nothing.

    Raises FileNotFoundError for a repository that is neither there nor in the cache, ValueError for the revision of a
    folder on disk.
    """
    if is_hub_name(source):
        from huggingface_hub import snapshot_download

        patterns = [f'{subfolder}/{it}' for it in files] if subfolder else [*files]
        try:
            source = snapshot_download(
                str(source), revision=revision, allow_patterns=patterns, local_files_only=local_only
            )
        except OSError as error:  # what huggingface_hub raises for all that goes wrong with a request
            told = ' '.join(str(error).split())
            raise FileNotFoundError(
                f'{source} is no folder, and it cannot be had from the Hugging Face Hub either: {told:.300}; if a '
                f'folder was meant: there is no {Path(source).absolute()}'
            ) from error
        except ValueError as error:
            raise FileNotFoundError(f'{source} is no folder, and no name on the Hugging Face Hub: {error}') from error
    elif revision is not None:
        raise ValueError(f'{source} is no name on the Hugging Face Hub, so that it has no revision {revision!r}')
    return Path(source) / (subfolder or '')


class HubModel:
    """What goes to the Hub: a class with `save_pretrained(folder)`."""

    def push_to_hub(
        self,
        repo_id: str,
        *,
        figures: Mapping[str, float] | None = None,
        private: bool | None = None,
        revision: str | None = None,
        commit_message: str | None = None,
        token: str | None = None,
    ) -> str:
        """Upload the model and a card, for `from_pretrained(repo_id)`.

        Args:
            repo_id: `user/name`, or a name of your own; the repository is made if there is none.
            figures: measures by name, for the card: those of an evaluation or a validation.
            private: who may read a repository that is made.
            revision: branch to commit to, made if there is none; by default the main one.
            token: by default that of the environment's `HF_TOKEN`, or the one that `hf auth login` keeps.

        Returns:
            address of the commit.
        """
        from huggingface_hub import HfApi

        api = HfApi(token=token)
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)  # before anything is made that would stay empty
            repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
            if revision is not None and not revision.startswith('refs/'):
                api.create_branch(repo_id, branch=revision, exist_ok=True)
            Path(folder, 'README.md').write_text(model_card(self, repo_id, figures or {}), encoding='utf-8')
            commit = api.upload_folder(
                repo_id=repo_id,
                folder_path=folder,
                revision=revision,
                commit_message=commit_message or f'Upload {type(self).__name__}',
            )
        return str(commit)


def model_card(model: Any, repo_id: str, figures: Mapping[str, float]) -> str:
    """What the model is, how it is loaded, and what was measured, with the head that the Hub reads."""
    from huggingface_hub import ModelCardData

    name, public = type(model).__name__, repo_id.rpartition('/')[2]
    head = ModelCardData(library_name='musiclm-pytorch', tags=['music', 'audio', name.lower()])
    if name == 'MusicLM':
        head.pipeline_tag = 'text-to-audio'
    lines = ['---', head.to_yaml(), '---', '', f'# {public}', '', '```', repr(model), '```', '', '```python']
    lines += [f'from musiclm_pytorch import {name}', '', f"model = {name}.from_pretrained('{repo_id}')", '```', '']
    if figures:
        lines += ['| measure | value |', '|---|---|']
        lines += [*(f'| {key} | {value:.4g} |' for key, value in figures.items()), '']
    return '\n'.join(lines)


def read_settings(source: str | Path) -> dict[str, Any]:
    """The `config.json` of a model of `transformers`, by folder or name on the Hugging Face Hub.

    Raises FileNotFoundError if there is none, ValueError for one that is no JSON object.
    """
    path = _folder_of(source, ('config.json',)) / 'config.json'
    if not path.is_file():
        raise FileNotFoundError(f'{source} has no config.json, so it is no folder of a model')
    settings = read_checked_json(path, verify=False)
    if not isinstance(settings, dict):
        raise ValueError(f'{path} must hold a JSON object, got {settings!r:.80}')
    return settings


def load_transformers(
    source: str | Path, kind: str = 'AutoModel', *, config: Any = None, unneeded: Sequence[str] = ()
) -> nn.Module:
    """A model of `transformers` in float32, in eval mode, whose weights are all there.

    Args:
        source: folder of a model, or its name on the Hugging Face Hub.
        kind: name of the class in `transformers`.
        config: in place of the saved one.
        unneeded: how the names of weights end that may be missing.

    Raises:
        FileNotFoundError: no such model. ValueError: a model of another kind or of code of its own, weights that are a
        pickle, damaged, or do not fit.
    """
    import transformers

    folder = _folder_of(source)
    if not any(folder.glob('*.safetensors')):
        if any(folder.glob('*.bin')):
            raise ValueError(f'{source} holds its weights as a pickle only, which could run code; {CONVERT}')
        raise FileNotFoundError(f'{source} has no weights, model.safetensors; if it has a pickle instead, {CONVERT}')
    keywords = {} if config is None else dict(config=config)
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()  # it would list what is missing; that is judged here
    try:
        with _told(source, folder):
            model, report = getattr(transformers, kind).from_pretrained(
                folder, output_loading_info=True, dtype=torch.float32, use_safetensors=True, **NO_CODE, **keywords
            )
    except OSError as error:
        raise ValueError(f'{source} could not be read: {" ".join(str(error).split()):.300}') from error
    finally:
        transformers.logging.set_verbosity(verbosity)
    missing = {it for it in report['missing_keys'] if not it.endswith(tuple(unneeded))}
    if missing or report['mismatched_keys']:
        raise ValueError(
            f'the weights in {source} do not fill this {type(model).__name__}: {len(missing)} are missing, such as '
            f'{min(missing, default="none")}, and {len(report["mismatched_keys"])} have another shape'
        )
    return model.eval()


def load_wave_encoder(source: str | Path, settings: dict[str, Any], unneeded: Sequence[str] = ()) -> nn.Module:
    """An audio encoder of `transformers` by its `settings`, those of `read_settings`; a MERT as the HuBERT that it is.

    Raises ValueError for a MERT that is more than that, and as `load_transformers`.
    """
    # with these off, MERT is HuBERT by another name, also as HubertModel writes it, and none of its own code is needed
    unlike = [it for it in ('feature_extractor_cqt', 'deepnorm') if settings.get(it)]
    is_mert = settings.get('model_type') == 'mert_model'
    if is_mert and not settings.get('feat_proj_layer_norm', True):
        unlike.append('feat_proj_layer_norm off')
    if unlike:
        raise ValueError(f'this MERT is no plain HuBERT: {", ".join(unlike)}')
    if not is_mert:
        return load_transformers(source, unneeded=unneeded)
    from transformers import HubertConfig

    config = HubertConfig(**{name: it for name, it in settings.items() if name != 'model_type'})
    return load_transformers(source, 'HubertModel', config=config, unneeded=unneeded)


def build_transformers(settings: dict[str, Any], kind: str = 'AutoModel') -> nn.Module:
    """A model of a config, in float32, with weights still to come; `kind` names its class in `transformers`."""
    import transformers

    settings = json.loads(json.dumps(settings))  # lists, where a saved config had tuples made of them
    config = transformers.AutoConfig.for_model(**settings)
    if kind != 'AutoModel':
        return getattr(transformers, kind)(config).float()
    return transformers.AutoModel.from_config(config, dtype=torch.float32)


def load_processor(source: str | Path, kind: str) -> Any:
    """What prepares the inputs of a model: `kind` names the class in `transformers`.

    Raises FileNotFoundError if there is none, ValueError for one that needs code of its own.
    """
    import transformers

    folder = _folder_of(source)
    try:
        with _told(source, folder):
            return getattr(transformers, kind).from_pretrained(folder, **NO_CODE)
    except OSError as error:
        raise FileNotFoundError(f'{source} has no {kind}: {" ".join(str(error).split()):.300}') from error


def _folder_of(source: str | Path, files: Sequence[str] = FILES) -> Path:
    """As `find_folder`; raises FileNotFoundError also where the folder is not there."""
    folder = find_folder(source, files=files)
    if not folder.exists():
        raise FileNotFoundError(f'{source} is neither the folder of a model nor on the Hugging Face Hub')
    return folder


@contextmanager
def _told(source: str | Path, folder: Path) -> Iterator[None]:
    """Raise ValueError that names the file or `source` for what `transformers` refuses in the block, but for OSError.

    It advises to let a repository's code run, or tells what is wrong and not where.
    """
    for path in sorted(folder.glob('*.json')):
        read_checked_json(path, verify=False)  # which names the file
    try:
        yield
    except (OSError, ImportError, MemoryError, torch.OutOfMemoryError):
        raise
    except SafetensorError as error:
        raise ValueError(
            f'the weights in {source} are damaged, they cannot be read as safetensors: {error}; they have to come '
            'from a copy'
        ) from error
    except Exception as error:  # by constructors that do not check what they are given
        if 'trust_remote_code' not in str(error):
            told = ' '.join(str(error).split())
            raise ValueError(f'{source} could not be read: {told:.300} ({type(error).__name__})') from error
        # not `from error`: what it advises would be shown
        raise ValueError(
            f'{source} needs code of its own (auto_map in its JSON files), and no code of a repository is run here; '
            'only what transformers has itself is read'
        ) from None


def save_encoder(folder: Path, *parts: Any, name: str = ENCODER_FOLDER) -> dict[str, Any]:
    """Write a model of `transformers` and what prepares its inputs into a folder within; gives what `find_encoder`
    wants to know."""
    inside = folder / name
    with naming(inside):
        for part in parts:
            part.save_pretrained(inside)
    open_modes(inside)
    checksums = {it.name: checksum_of_file(it) for it in sorted(inside.iterdir())}
    return dict(folder=name, checksums=checksums)


def find_encoder(config: Any, verify: bool, key: str = ENCODER_FOLDER) -> Path:
    """The folder that `save_encoder` wrote, of the `SavedConfig` that has what it gave under `key`.

    Raises FileNotFoundError for a missing file and, with `verify`, ValueError for one that is not what was written.
    """
    with config.refused(f'{key!r} must name a folder beside it', config.content.get(key)):
        inside = config.path.parent / config[key]['folder']
        checksums = dict(config[key].get('checksums', {})) if verify else {}
    for name, checksum in checksums.items():
        if not (inside / name).is_file():
            raise FileNotFoundError(f'no {name} in {inside}, which {config.path} names')
        if checksum_of_file(inside / name) != checksum:
            raise ValueError(
                f'{inside / name} is damaged: it is not what was written, by its checksum; it has to come from a '
                'copy (verify=False reads it all the same)'
            )
    return inside
