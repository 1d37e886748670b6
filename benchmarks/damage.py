"""Damage every kind of file that is read, in every way, and look at what comes of it.

    python benchmarks/damage.py
    python benchmarks/damage.py --each 20 --kinds mulan tokens --seed 1 --show
    python benchmarks/damage.py --cost 9

Each variation damages one file of a sound folder and reads the folder in a forked child, whose memory and time are
compared with those of the sound one:

    sound       the same result, without a word
    error       ValueError, TypeError or OSError that names the file or its folder
    told        a warning or log, and the program goes on
    edit        another result of what nobody can know to be damage: a text or table written by hand, a JSON whose
                checksum was taken out, a caption
    samples     other samples of audio, whose format has no checksum
    silent      another result without a word
    unnamed     another error, or one without the file
    memory      over 100 MB more than the sound one
    hang        over 5 s of CPU time more, or a crash of the process

The last four ought to be 0.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import gc
import hashlib
import json
import logging
import os
import random
import re
import resource
import select
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from results import add_out, write_results  # beside this file
from torch import nn

from musiclm_pytorch import (
    AudioSpectrogramTransformer,
    MuLaN,
    MuLaNEmbedQuantizer,
    MuLaNIndex,
    MuLaNSemanticTokenizer,
    MuLaNTrainer,
    MusicLM,
    ShardedAudioText,
    TextTransformer,
    write_shards,
)
from musiclm_pytorch.audiolm.convert import CoarseTransformer, FineTransformer, SemanticTransformer, SoundStream
from musiclm_pytorch.audiolm.crops import TokenCrops
from musiclm_pytorch.audiolm.saving import load_module, save_module
from musiclm_pytorch.audiolm.semantic import SemanticTokenizer
from musiclm_pytorch.audiolm.semantic_transformers import TransformersSemanticTokenizer
from musiclm_pytorch.audiolm.spectral_codec import SpectralCodec
from musiclm_pytorch.audiolm.tokens import compute_tokens
from musiclm_pytorch.data.datasets import AudioTextDataset
from musiclm_pytorch.pretrained import find_pretrained
from musiclm_pytorch.trainer.config_schema import shipped_recipes
from musiclm_pytorch.trainer.pipeline_recipe import MusicLMRecipe
from musiclm_pytorch.trainer.recipes import MuLaNRecipe

RATE = 8000
OUTCOMES = ('sound', 'error', 'told', 'edit', 'samples', 'silent', 'unnamed', 'memory', 'hang')
BAD = ('silent', 'unnamed', 'memory', 'hang')
MEGABYTES, SECONDS = 100, 5.0
BATCH = 10  # folders that a child reads; forking costs as much as reading one
HAND_WRITTEN = ('.csv', '.tsv', '.jsonl', '.yaml', '.txt')
AUDIO = ('.wav', '.flac')
VALUES = (
    *(0, -1, -(10**6), 10**6, 10**9, 2**40, 10**30, 1e308, float('nan'), float('inf'), 0.5),
    *(None, True, False, '', 'x', '../..', '1e9', [], {}, [1, 2], ['a'], {'a': 1}, [[]]),
)


@dataclass
class Kind:
    """A folder of one kind.

    Attributes:
        make: writes a sound one; called twice, with other seeds, so that files can be swapped.
        read: what a user does with it; gives what is compared.
        files: patterns of the files that are damaged.
    """

    make: Callable[[Path, int], Any]
    read: Callable[[Path], Any]
    files: tuple[str, ...] = ('**/*',)


# ---- what there is ----


def tiny_mulan(seed: int = 0, **text: Any) -> MuLaN:
    torch.manual_seed(seed)
    sizes = dict(dim=16, depth=1, heads=2, dim_head=8)
    audio = AudioSpectrogramTransformer(
        **sizes, audio_sample_rate=RATE, support_variable_length=True, spec_n_fft=256, spec_hop_length=128,
        spec_win_length=256, spec_n_mels=32, patch_size=8, max_audio_length=RATE,
    )  # fmt: skip
    return MuLaN(audio, TextTransformer(**sizes, max_seq_len=8, known_tokens=[*range(1, 50)], **text), dim_latent=8)


def tiny_quantizer(seed: int = 0) -> MuLaNEmbedQuantizer:
    quantizer = MuLaNEmbedQuantizer(
        tiny_mulan(seed).eval(), conditioning_dims=(16,) * 3, rq_num_quantizers=2, codebook_size=6
    )
    with torch.no_grad():
        quantizer.fit(torch.nn.functional.normalize(torch.randn(40, 8), dim=-1))
    return quantizer.eval()


def tiny_spectral_codec(seed: int = 0) -> SpectralCodec:
    torch.manual_seed(seed)
    codec = SpectralCodec(
        sample_rate=RATE, codebook_size=8, num_quantizers=3, resolved_hz=1000.0, bands=8, components=16
    )
    codec.fit([torch.randn(RATE) * 0.1 for _ in range(4)])
    return codec


def tiny_sound_stream(seed: int = 0) -> SoundStream:
    torch.manual_seed(seed)
    return SoundStream(
        channels=4, strides=(2, 4), channel_mults=(1, 2), codebook_dim=8, codebook_size=8, rq_num_quantizers=2,
        target_sample_hz=RATE, attn_dim_head=4, attn_heads=1, use_local_attn=False,
    )  # fmt: skip


def tiny_tokenizer(seed: int = 0) -> SemanticTokenizer:
    tokenizer = MuLaNSemanticTokenizer(tiny_mulan(seed), codebook_size=8, layer=1)
    tokenizer.fit([torch.randn(RATE) * 0.1 for _ in range(4)])
    return tokenizer


def tiny_hubert(seed: int = 0) -> SemanticTokenizer:
    from transformers import HubertConfig, HubertModel

    torch.manual_seed(seed)
    config = HubertConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, conv_dim=(8, 8),
        conv_kernel=(10, 3), conv_stride=(5, 2), num_feat_extract_layers=2, num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
    )  # fmt: skip
    tokenizer = TransformersSemanticTokenizer(HubertModel(config), codebook_size=8, layer=1, target_sample_hz=RATE)
    tokenizer.fit([torch.randn(RATE) * 0.1 for _ in range(4)])
    return tokenizer


def stage(kind: type, seed: int, **sizes: int) -> nn.Module:
    torch.manual_seed(seed)
    return kind(dim=16, depth=1, heads=2, dim_head=8, audio_text_condition=True, cond_dim=16, **sizes)


def saved(module: Any, folder: Path) -> None:
    module.save_pretrained(folder)


class Noise(torch.utils.data.Dataset):
    """Waves and captions that depend on the seed."""

    sample_rate = RATE

    def __init__(self, seed: int, count: int = 6):
        self.seed, self.count = seed, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Any]:
        draw = torch.Generator().manual_seed(1000 * self.seed + index)
        wave = (torch.randn(RATE // 2, generator=draw) * 0.1).clamp(-1, 1)
        return dict(wave=wave, caption=f'clip {index} of {self.seed}')


def make_index(folder: Path, seed: int) -> None:
    index = MuLaNIndex(dim=8)
    index.add([f'clip {i}' for i in range(20)], torch.randn(20, 8, generator=torch.Generator().manual_seed(seed)))
    index.save(folder)


def read_index(folder: Path) -> Any:
    index = MuLaNIndex.load(folder)
    return index.names, index.vectors, index.about, index.dim


def make_tokens(folder: Path, seed: int) -> None:
    parts = dict(tokenizer=tiny_tokenizer(0), codec=tiny_spectral_codec(0), quantizer=tiny_quantizer(0))
    compute_tokens(Noise(seed, 8), folder, **parts, shard_size=3, progress=False, mulan_seconds=0.25, mulan_hop=0.125)


def read_tokens(folder: Path) -> Any:
    return [
        [crops[index] for index in range(len(crops))]
        for name, share in (('semantic', 0.0), ('coarse', 1.0), ('fine', 0.0))
        for crops in [TokenCrops(folder, name, seconds=0.2, training=False, text_share=share)]
    ]


def make_shards(folder: Path, seed: int) -> None:
    write_shards(Noise(seed), folder, shard_size=3)


def items(dataset: Any) -> Any:
    return [(None, None) if it is None else (it['caption'], it['wave']) for it in dataset]


def read_shards(folder: Path) -> Any:
    return items(ShardedAudioText(folder, sample_rate=RATE, training=False, min_seconds=0.1))


def make_audio(folder: Path, seed: int) -> None:
    for index in range(4):
        item, suffix = Noise(seed)[index], ('wav', 'flac')[index % 2]
        folder.mkdir(exist_ok=True)
        soundfile.write(folder / f'{index}.{suffix}', item['wave'].numpy(), RATE, 'PCM_16')
        (folder / f'{index}.txt').write_text(item['caption'])


def make_manifest(folder: Path, seed: int) -> None:
    make_audio(folder, seed)
    names = sorted(it.name for suffix in ('wav', 'flac') for it in folder.glob(f'*.{suffix}'))
    table = [f'{name},"a {seed} song, {place}",0.{place},{0.4 + place / 100}' for place, name in enumerate(names)]
    (folder / 'm.csv').write_text('\n'.join(['path,caption,start,end', *table]) + '\n')
    rows = [dict(path=name, caption=f'{seed} {place}', start=0, end=0.4) for place, name in enumerate(names)]
    (folder / 'm.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))


def read_manifests(folder: Path) -> Any:
    return [
        items(map(found.__getitem__, range(len(found))))
        for name in ('m.csv', 'm.jsonl')
        for found in [AudioTextDataset.from_manifest(folder / name, sample_rate=RATE, training=False, min_seconds=0.1)]
    ]


def read_audio(folder: Path) -> Any:
    found = AudioTextDataset.from_folder(folder, sample_rate=RATE, training=False, min_seconds=0.1)
    return items(map(found.__getitem__, range(len(found))))


def make_recipes(folder: Path, seed: int) -> None:
    folder.mkdir()
    for name in RECIPES:
        if name in shipped_recipes():
            text = shipped_recipes()[name].read_text()
            (folder / f'{name}.yaml').write_text(text.replace('dim: ', 'dim: 2') if seed else text)
    MusicLMRecipe().with_seed(seed).save(folder)


def read_recipes(folder: Path) -> Any:
    return [repr(RECIPES[path.stem].load(path).to_dict()) for path in sorted(folder.iterdir())]


RECIPES = dict(mulan_small=MuLaNRecipe, musiclm_small=MusicLMRecipe, recipe=MusicLMRecipe)


def trainer_of(folder: Path, seed: int, steps: int) -> MuLaNTrainer:
    draw = torch.Generator().manual_seed(seed)
    pairs = [(torch.randn(RATE // 2, generator=draw), torch.randint(1, 50, (5,), generator=draw)) for _ in range(8)]
    trainer = MuLaNTrainer(
        tiny_mulan(seed), pairs, batch_size=4, valid_frac=0, checkpoint_every=1, max_checkpoints=1, use_ema=True,
        results_folder=folder, progress=False, accelerate_kwargs=dict(cpu=True), resume=True,
    )  # fmt: skip
    if steps:
        trainer.train(num_train_steps=steps, with_validation=False)
    return trainer


def read_checkpoint(folder: Path) -> Any:
    trainer = trainer_of(folder, 0, 0)
    trainer.load(next(iter(sorted((folder / 'checkpoints').iterdir()))))
    return without_position(trainer.state())


def without_position(state: dict[str, Any]) -> Any:
    return {key: it for key, it in state.items() if key not in ('data', 'config')}


def state_of(module: nn.Module) -> Any:
    """Everything that what a module gives depends on."""
    return [*module.named_parameters(), *module.named_buffers(), settings(module)]


def settings(module: nn.Module) -> Any:
    plain = (int, float, str, bool, tuple, type(None))
    return [
        (name, key, value)
        for name, it in module.named_modules()
        for key, value in vars(it).items()
        if isinstance(value, plain) and not key.startswith('_') and key != 'name_or_path'  # where it was read
    ]


def kind_of_module(make: Callable[[int], nn.Module]) -> Kind:
    return Kind(lambda folder, seed: save_module(make(seed), folder), lambda folder: state_of(load_module(folder)))


KINDS = {
    'mulan': Kind(
        lambda folder, seed: saved(tiny_mulan(seed), folder), lambda folder: state_of(MuLaN.from_pretrained(folder))
    ),
    'quantizer': Kind(
        lambda folder, seed: saved(tiny_quantizer(seed), folder),
        lambda folder: state_of(MuLaNEmbedQuantizer.from_pretrained(folder)),
    ),
    'spectral codec': kind_of_module(tiny_spectral_codec),
    'SoundStream': kind_of_module(tiny_sound_stream),
    'tokenizer': Kind(
        lambda folder, seed: saved(tiny_tokenizer(seed), folder),
        lambda folder: state_of(SemanticTokenizer.from_pretrained(folder)),
    ),
    'HuBERT tokenizer': Kind(
        lambda folder, seed: saved(tiny_hubert(seed), folder),
        lambda folder: state_of(SemanticTokenizer.from_pretrained(folder)),
    ),
    'semantic': kind_of_module(lambda seed: stage(SemanticTransformer, seed, num_semantic_tokens=8)),
    'coarse': kind_of_module(
        lambda seed: stage(CoarseTransformer, seed, num_semantic_tokens=8, codebook_size=8, num_coarse_quantizers=2)
    ),
    'fine': kind_of_module(
        lambda seed: stage(FineTransformer, seed, codebook_size=8, num_coarse_quantizers=2, num_fine_quantizers=1)
    ),
    'musiclm': Kind(
        lambda folder, seed: shutil.copytree(find_pretrained('tiny'), folder),
        lambda folder: state_of(MusicLM.from_pretrained(folder)),
    ),
    'checkpoint': Kind(lambda folder, seed: trainer_of(folder, seed, 2), read_checkpoint, ('checkpoints/*/*',)),
    'index': Kind(make_index, read_index),
    'tokens': Kind(make_tokens, read_tokens),
    'shards': Kind(make_shards, read_shards),
    'manifests': Kind(make_manifest, read_manifests, ('*.csv', '*.jsonl')),
    'recipes': Kind(make_recipes, read_recipes),
    'audio': Kind(make_audio, read_audio),
}


# ---- damage ----


def truncate(content: bytes, draw: random.Random, **_: Any) -> bytes:
    return content[: draw.choice([draw.randrange(len(content)), max(0, len(content) - draw.randrange(1, 9))])]


def flip(content: bytes, draw: random.Random, **_: Any) -> bytes:
    place = draw.randrange(draw.choice([len(content), min(2000, len(content))]))  # headers are short
    return content[:place] + bytes([content[place] ^ 1 << draw.randrange(8)]) + content[place + 1 :]


def insert(content: bytes, draw: random.Random, **_: Any) -> bytes:
    place = draw.randrange(len(content) + 1)
    return content[:place] + draw.randbytes(draw.randrange(1, 9)) + content[place:]


def delete(content: bytes, draw: random.Random, **_: Any) -> bytes:
    place = draw.randrange(len(content))
    return content[:place] + content[place + draw.randrange(1, 9) :]


def empty(content: bytes, draw: random.Random, **_: Any) -> bytes:
    return b'' if draw.random() < 0.5 else bytes(len(content))


def swap(content: bytes, draw: random.Random, *, path: Path, others: list[Path]) -> bytes | None:
    """Another sound file of this kind of file."""
    fitting = [it for it in others if it.suffix == path.suffix]
    return draw.choice(fitting).read_bytes() if fitting else None


def value(content: bytes, draw: random.Random, *, path: Path, sealed: bool = True, **_: Any) -> bytes | None:
    """Another value in a JSON, in the header of safetensors, or in a text."""
    if path.suffix == '.safetensors':
        (size,) = struct.unpack('<Q', content[:8])
        header = changed_value(json.loads(content[8 : 8 + size]), draw)
        text = json.dumps(header).encode()
        return struct.pack('<Q', len(text)) + text + content[8 + size :]
    if path.suffix == '.json':
        tree = json.loads(content)
        tree = changed_value(tree, draw)
        if not sealed and isinstance(tree, dict):
            tree.pop('checksum', None)
        return json.dumps(tree).encode()
    if path.suffix in HAND_WRITTEN:
        words = [*re.finditer(rb'[^\s:,"{}\[\]]+', content)]
        chosen = draw.choice(words)
        new = draw.choice([json.dumps(draw.choice(VALUES)), '', '9' * 30, '-1', '\0', ':', '- ', '"'])
        return content[: chosen.start()] + new.encode() + content[chosen.end() :]
    return None


def unsealed(content: bytes, draw: random.Random, *, path: Path, **_: Any) -> bytes | None:
    """Another value in a JSON whose checksum was taken out, as before there was any."""
    return value(content, draw, path=path, sealed=False) if path.suffix == '.json' else None


def changed_value(tree: Any, draw: random.Random) -> Any:
    places: list[tuple[Any, Any]] = []

    def visit(node: Any) -> None:
        for key in node if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ():
            places.append((node, key))
            visit(node[key])

    visit(tree)
    node, key = draw.choice(places)
    if isinstance(node, dict) and draw.random() < 0.15:
        del node[key]
    elif isinstance(node[key], (int, float)) and not isinstance(node[key], bool) and draw.random() < 0.3:
        node[key] = node[key] * draw.choice([2, 10, 1000, 10**6])
    else:
        node[key] = draw.choice(VALUES)
    return tree


DAMAGES = {it.__name__: it for it in (truncate, flip, insert, delete, value, unsealed, empty, swap)}


# ---- looking ----


def digest_of(found: Any) -> str:
    digest = hashlib.sha256()

    def visit(it: Any) -> None:
        if isinstance(it, torch.Tensor):
            it = it.detach().cpu().contiguous()
            digest.update(f'{it.dtype}{tuple(it.shape)}'.encode())
            digest.update(it.reshape(-1).view(torch.uint8).numpy().tobytes())
        elif isinstance(it, dict):
            for key in it:
                digest.update(repr(key).encode())
                visit(it[key])
        elif isinstance(it, (list, tuple)):
            digest.update(b'[')
            for one in it:
                visit(one)
        else:
            digest.update(repr(it).encode())

    visit(found)
    return digest.hexdigest()


def without_waves(found: Any) -> Any:
    if isinstance(found, torch.Tensor):
        return None
    return [without_waves(it) for it in found] if isinstance(found, (list, tuple)) else found


class Heard(logging.Handler):
    def __init__(self):
        super().__init__(logging.WARNING)
        self.words: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.words.append(record.getMessage())


@contextlib.contextmanager
def hearing() -> Iterator[list[str]]:
    """Warnings, and what is logged at this level and above."""
    handler = Heard()
    logging.captureWarnings(True)
    logging.root.addHandler(handler)
    names = ('musiclm_pytorch', 'py.warnings', 'transformers')
    before = [(it, it.propagate, it.level) for it in map(logging.getLogger, names)]
    for it, *_ in before:
        it.propagate = True
        it.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('always')
            yield handler.words
    finally:
        logging.root.removeHandler(handler)
        logging.captureWarnings(False)
        for it, propagate, level in before:
            it.propagate = propagate
            it.setLevel(level)


def look(kind: Kind, folder: Path, damaged: Path | None) -> dict[str, Any]:
    """Read a folder, and tell what came of it."""
    with hearing() as words:
        try:
            found = kind.read(folder)
        except Exception as error:  # the outcome of this one
            seen = error
            while seen is not None:
                if isinstance(seen, MemoryError) or 'allocate memory' in str(seen) or 'CPUAllocator' in str(seen):
                    return dict(outcome='memory', text=repr(error)[:500])
                seen = seen.__cause__ or seen.__context__
            clear = isinstance(error, (ValueError, TypeError, OSError)) and 'violates type hint' not in str(error)
            named = damaged is not None and any(str(it) in str(error) for it in (damaged, damaged.parent))
            text = f'{type(error).__name__}: {error}'
            if not (clear and named):
                text += ''.join(traceback.format_tb(error.__traceback__)[-2:])
            return dict(outcome='error' if clear and named else 'unnamed', text=text[:1500])
    return dict(
        outcome='read', digest=digest_of(found), rest=digest_of(without_waves(found)), text=' | '.join(words)[:500],
        told=bool(words),
    )  # fmt: skip


def status(name: str) -> int:
    """Kilobytes, by /proc."""
    return int(re.search(rf'{name}:\s+(\d+)', Path('/proc/self/status').read_text())[1])


@dataclass
class Variation:
    folder: Path
    damaged: Path | None = None
    file: Path | None = None
    damage: str = ''


def measured(kind: Kind, one: Variation, limit: dict[str, float] | None) -> dict[str, Any]:
    """What came of reading a folder in this process, with the memory and the CPU time that it took."""
    gc.collect()
    Path('/proc/self/clear_refs').write_text('5')  # forget the peak before
    before, used = status('VmRSS'), time.process_time()
    if limit is not None:
        room = status('VmSize') * 1024 + int((limit['memory'] + MEGABYTES) * 2**20) + 2**29
        resource.setrlimit(resource.RLIMIT_AS, (room, resource.RLIM_INFINITY))
        signal.setitimer(signal.ITIMER_PROF, limit['seconds'] + SECONDS)  # ends this process
        signal.alarm(300)
    found = look(kind, one.folder, one.damaged)
    return found | dict(memory=(status('VmHWM') - before) / 1024, seconds=time.process_time() - used)


@dataclass
class Running:
    pid: int
    pipe: int
    batch: list[Variation]


def start(kind: Kind, batch: list[Variation], limit: Any) -> Running:
    """A forked child that reads one folder after another, and writes a line of JSON of each into the pipe."""
    receive, send = os.pipe()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            with open(send, 'w') as lines:
                for one in batch:
                    lines.write(json.dumps(measured(kind, one, limit)) + '\n')
                    lines.flush()
            code = 0
        finally:
            os._exit(code)
    os.close(send)
    return Running(pid, receive, batch)


def finish(running: Running) -> tuple[list[dict[str, Any]], list[Variation]]:
    """What came of each folder up to the one that ended the child, if one did, and those that it did not reach."""
    with open(running.pipe) as lines:
        found = [json.loads(line) for line in lines]
    _, code = os.waitpid(running.pid, 0)
    if code:
        found.append(dict(outcome='hang', text=f'ended by {signal.Signals(code & 127).name if code & 127 else code}'))
    for one in running.batch[: len(found)]:
        shutil.rmtree(one.folder, ignore_errors=True)
    return found, running.batch[len(found) :]


def judged(found: dict[str, Any], sound: dict[str, Any], file: Path, damage: str, limit: dict[str, float]) -> str:
    if found['outcome'] != 'hang' and found.get('memory', 0) > limit['memory'] + MEGABYTES:
        return 'memory'
    if found['outcome'] != 'hang' and found.get('seconds', 0) > limit['seconds'] + SECONDS:
        return 'hang'
    if found['outcome'] != 'read':
        return found['outcome']
    if found['digest'] == sound['digest']:
        return 'sound'
    if found['told']:
        return 'told'
    if file.suffix in HAND_WRITTEN or damage == 'unsealed' or file.name == 'recipe.json':
        return 'edit'
    if file.suffix in (*AUDIO, '.tar') and found['rest'] == sound['rest']:
        return 'samples'
    return 'silent'


def copied(sound: Path, folder: Path, file: Path, content: bytes) -> Path:
    """A copy of a folder by links, but for one file. Its path."""
    shutil.copytree(sound, folder, copy_function=os.link)
    damaged = folder / file
    damaged.unlink()
    damaged.write_bytes(content)
    return damaged


def variations(kind: Kind, sound: Path, other: Path, draw: random.Random, each: int) -> Iterator[tuple]:
    """Name of the damage, file and content, of so many variations of each damage."""
    files = sorted({it for glob in kind.files for it in sound.glob(glob) if it.is_file()})
    others = [it for it in (*sound.rglob('*'), *other.rglob('*')) if it.is_file()]
    for name, damage in DAMAGES.items():
        for _ in range(each):
            for _ in range(20):
                path = draw.choice(files)
                keywords = dict(path=path, others=[it for it in others if it != path])
                content = damage(path.read_bytes(), draw, **keywords)
                if content is not None and content != path.read_bytes():
                    yield name, path.relative_to(sound), content
                    break


def run(name: str, kind: Kind, root: Path, each: int, seed: int, jobs: int, show: bool) -> collections.Counter:
    sound, other = root / f'{name}-sound', root / f'{name}-other'
    kind.make(sound, 0)
    kind.make(other, 1)
    kind.read(sound)  # what is imported late is imported now, once
    gc.collect()
    gc.freeze()
    copies = [Variation(root / f'sound-{place}') for place in range(3)]
    for one in copies:
        shutil.copytree(sound, one.folder, copy_function=os.link)
    figures = [finish(start(kind, [one], None))[0][0] for one in copies]
    if {it['outcome'] for it in figures} != {'read'} or len({it['digest'] for it in figures}) != 1:
        raise RuntimeError(f'the sound {name} does not read alike: {figures}')
    limit = dict(memory=max(it['memory'] for it in figures), seconds=max(it['seconds'] for it in figures))

    counts: collections.Counter = collections.Counter()
    running: dict[int, Running] = {}

    def launch(batch: list[Variation]) -> None:
        if batch:
            one = start(kind, batch, limit)
            running[one.pipe] = one

    def collect() -> None:
        ready, *_ = select.select([*running], [], [])
        for pipe in ready:
            finished = running.pop(pipe)
            found, left = finish(finished)
            for one, it in zip(finished.batch, found):
                outcome = judged(it, figures[0], one.file, one.damage, limit)
                counts[outcome] += 1
                if outcome in BAD or show:
                    print(f'  {outcome}: {name}, {one.damage} {one.file}: {it["text"]}', file=sys.stderr, flush=True)
            launch(left)

    draw = random.Random(f'{seed} {name}')
    batch: list[Variation] = []
    for number, (damage, file, content) in enumerate(variations(kind, sound, other, draw, each)):
        folder = root / f'{number}'
        batch.append(Variation(folder, copied(sound, folder, file, content), file, damage))
        if len(batch) == BATCH:
            launch(batch)
            batch = []
        while len(running) >= jobs:
            collect()
    launch(batch)
    while running:
        collect()
    shutil.rmtree(sound)
    shutil.rmtree(other, ignore_errors=True)
    return counts


# ---- what checking costs ----


def cost(repeats: int) -> dict[str, dict[str, float]]:
    """Time to load with and without `verify`, in turn: medians of CPU time, which other programs disturb least."""
    costs = {}
    torch.manual_seed(0)
    sizes = dict(dim=1024, heads=16, dim_head=64)
    with tempfile.TemporaryDirectory() as large:
        MuLaN(AudioSpectrogramTransformer(**sizes, depth=1), TextTransformer(**sizes, depth=14)).save_pretrained(large)
        gigabytes = (Path(large) / 'model.safetensors').stat().st_size / 1e9
        cases = {'tiny': (MusicLM, find_pretrained('tiny')), f'MuLaN of {gigabytes:.2f} GB': (MuLaN, large)}
        for name, (kind, folder) in cases.items():
            kind.from_pretrained(folder)
            found: dict[bool, list[float]] = {True: [], False: []}
            for _ in range(repeats):
                for verify in found:
                    begin = time.process_time()
                    kind.from_pretrained(folder, verify=verify)
                    found[verify].append(time.process_time() - begin)
            with_it, without = (float(np.median(found[it])) for it in (True, False))
            print(f'{name}: {with_it:.3f} s checked, {without:.3f} s not: {with_it / without - 1:+.1%}', flush=True)
            costs[name] = dict(repeats=repeats, checked=with_it, unchecked=without)
    return costs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--kinds', nargs='+', choices=KINDS, default=[*KINDS])
    parser.add_argument('--each', type=int, default=40, help='variations of each damage to each kind')
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--jobs', type=int, default=2)
    parser.add_argument('--show', action='store_true', help='tell what came of each variation')
    parser.add_argument('--cost', type=int, default=0, metavar='REPEATS', help='measure what checking costs instead')
    add_out(parser, 'damage')
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.cost:
        write_results(options.out, dict(cost=cost(options.cost)))
        return
    total: collections.Counter = collections.Counter()
    rows = {}
    print(f'| kind | {" | ".join(OUTCOMES)} |\n|---|{"---:|" * len(OUTCOMES)}', flush=True)
    with tempfile.TemporaryDirectory() as root:
        for name in options.kinds:
            counts = run(name, KINDS[name], Path(root), options.each, options.seed, options.jobs, options.show)
            total += counts
            rows[name] = {it: counts[it] for it in OUTCOMES}
            print(f'| {name} | {" | ".join(map(str, rows[name].values()))} |', flush=True)
    print(f'| all {sum(total[it] for it in OUTCOMES)} | {" | ".join(str(total[it]) for it in OUTCOMES)} |')
    write_results(options.out, dict(each=options.each, seed=options.seed, rows=rows))
    sys.exit(any(total[it] for it in BAD))


if __name__ == '__main__':
    main()
