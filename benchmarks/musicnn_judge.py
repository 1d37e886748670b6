"""A judge that is not ours: musicnn (arXiv 1909.06654), a tagger of music trained on MagnaTagATune, in PyTorch.

    python benchmarks/musicnn_judge.py a.wav b.ogg             # the first tags of files
    python benchmarks/musicnn_judge.py --check FOLDER          # is the network rebuilt as it was trained?

The weights come from the package musicnn 0.1.0 (ISC licence), which is looked for where it is installed, or is fetched
by `pip download musicnn==0.1.0 --no-deps`; neither it nor TensorFlow is imported. Its checkpoint is an index in the
format of a LevelDB table, which tells where each variable lies in the data file.

`--check` compares what each of the network's 11 batch normalizations meets in real music with the mean and variance
that it kept of its training: a kernel in the wrong place or turned the wrong way would leave them unrelated.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import struct
import subprocess
import sys
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import librosa
import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from musiclm_pytorch.data.audio import AudioFile, resample
from musiclm_pytorch.evaluation.embedders import check_waves

RELEASE = 'musicnn==0.1.0'
ROOT = Path(__file__).resolve().parent.parent
# configuration.py of the package
RATE, HOP, WINDOW, BANDS = 16000, 256, 512, 96
PATCH, PATCH_HOP = 187, 126  # frames: 3 s as in training, 2 s, so that 5 s are two patches
TAGS = (
    *('guitar', 'classical', 'slow', 'techno', 'strings', 'drums', 'electronic', 'rock', 'fast', 'piano', 'ambient'),
    *('beat', 'violin', 'vocal', 'synth', 'female', 'indian', 'opera', 'male', 'singing', 'vocals', 'no vocals'),
    *('harpsichord', 'loud', 'quiet', 'flute', 'woman', 'male vocal', 'no vocal', 'pop', 'soft', 'sitar', 'solo'),
    *('man', 'classic', 'choir', 'voice', 'new age', 'dance', 'male voice', 'female vocal', 'beats', 'harp', 'cello'),
    *('no voice', 'weird', 'country', 'metal', 'female voice', 'choral'),
)

# ---- the checkpoint ----

MAGIC = 0xDB4775248B80FB57
FLOAT32 = 1  # of TensorFlow's DataType


def find_musicnn(place: str | Path | None = None) -> Path:
    """The wheel or the folder of the package: as given, or installed, or fetched to `build/`.

    Raises FileNotFoundError for a path where there is nothing, and if pip cannot fetch the package.
    """
    if place is not None:
        if not Path(place).exists():
            raise FileNotFoundError(f'no wheel of {RELEASE} and no folder of the package at {place!s}')
        return Path(place)
    if (spec := importlib.util.find_spec('musicnn')) is not None:  # found, not imported: it would import TensorFlow
        return Path(spec.submodule_search_locations[0])
    folder = ROOT / 'build' / 'musicnn'
    if not (found := sorted(folder.glob('musicnn-*.whl'))):
        command = [sys.executable, '-m', 'pip', 'download', '--quiet', '--no-deps', '--dest', str(folder), RELEASE]
        if subprocess.run(command, check=False).returncode or not (found := sorted(folder.glob('musicnn-*.whl'))):
            raise FileNotFoundError(f'pip could not download {RELEASE}; pass the path of its wheel')
    return found[0]


def read_files(place: Path, model: str) -> tuple[bytes, bytes]:
    """The index and the data of a model's checkpoint, from the wheel or the folder of the package."""
    names = [f'{model}/.index', f'{model}/.data-00000-of-00001']
    if place.is_dir():
        return tuple((place / name).read_bytes() for name in names)
    with zipfile.ZipFile(place) as wheel:  # which checks what it reads by its CRC
        return tuple(wheel.read(f'musicnn/{name}') for name in names)


def varint(content: bytes, place: int) -> tuple[int, int]:
    """A number of 7 bits a byte, the lowest first, and where it ends."""
    number = shift = 0
    while True:
        byte = content[place]
        number |= (byte & 127) << shift
        place, shift = place + 1, shift + 7
        if byte < 128:
            return number, place


def block_entries(content: bytes, offset: int, size: int) -> Iterator[tuple[bytes, bytes]]:
    """Keys and values of a block of a table. A key is told as what it shares with the one before, and the rest."""
    if content[offset + size] != 0:
        raise ValueError(f'the block at byte {offset} of the index is compressed, by method {content[offset + size]}')
    block = content[offset : offset + size]
    (restarts,) = struct.unpack('<I', block[-4:])
    place, end, key = 0, size - 4 * (restarts + 1), b''
    while place < end:
        shared, place = varint(block, place)
        own, place = varint(block, place)
        length, place = varint(block, place)
        key = key[:shared] + block[place : place + own]
        yield key, block[place + own : place + own + length]
        place += own + length


def fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Numbers and values of the fields of a protocol buffer."""
    place = 0
    while place < len(message):
        key, place = varint(message, place)
        kind = key & 7
        if kind == 0:
            value, place = varint(message, place)
        elif kind == 2:
            length, place = varint(message, place)
            value, place = message[place : place + length], place + length
        elif kind == 5:
            value, place = message[place : place + 4], place + 4
        else:
            raise ValueError(f'field {key >> 3} has the wire type {kind}, which no checkpoint uses')
        yield key >> 3, value


def read_checkpoint(index: bytes, data: bytes) -> dict[str, np.ndarray]:
    """The float32 variables of a TensorFlow checkpoint of one data file, by name.

    Raises ValueError for what is no such index, and for a variable whose bytes do not fit its shape.
    """
    footer = index[-48:]
    if len(footer) < 48 or struct.unpack('<Q', footer[-8:])[0] != MAGIC:
        raise ValueError('this is no index of a checkpoint: it does not end with the magic number of a table')
    _, place = varint(footer, 0)  # the block of metadata: its offset and size
    _, place = varint(footer, place)
    offset, place = varint(footer, place)
    size, _ = varint(footer, place)
    found = {}
    for _, handle in block_entries(index, offset, size):
        start, place = varint(handle, 0)
        for key, value in block_entries(index, start, varint(handle, place)[0]):
            if not key:  # the header
                continue
            # BundleEntryProto: 1 the type, 2 the shape, 4 the offset, 5 the size
            entry = {1: 0, 2: b'', 4: 0, 5: 0} | dict(fields(value))
            shape = [dict(fields(it)).get(1, 0) for number, it in fields(entry[2]) if number == 2]
            if entry[1] != FLOAT32:
                continue
            if entry[5] != 4 * math.prod(shape) or entry[4] + entry[5] > len(data):
                raise ValueError(f'{key.decode()} of shape {shape} cannot lie in {entry[5]} bytes at {entry[4]}')
            found[key.decode()] = np.frombuffer(data, '<f4', math.prod(shape), entry[4]).reshape(shape)
    return found


# ---- the network ----


def log_mel(wave: Tensor) -> Tensor:
    """What the network hears of `(samples,)` at 16 kHz: `(frames, 96)` float32."""
    mel = librosa.feature.melspectrogram(
        y=wave.numpy(), sr=RATE, n_fft=WINDOW, hop_length=HOP, n_mels=BANDS, pad_mode='reflect'
    )
    # half precision as in its training; the package multiplies in float32, by the rules of numpy 1
    return torch.from_numpy(np.log10(10000 * mel.T.astype(np.float16).astype(np.float32) + 1))


class Normalized(nn.Module):
    """A convolution over time, ReLU and batch normalization, in the order of the package."""

    def __init__(self, kernel: tuple[int, int], filters: int, channels: int = 1):
        super().__init__()
        self.conv = nn.Conv2d(channels, filters, kernel)
        self.norm = nn.BatchNorm2d(filters, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        """`(b, 1, t, f)` to `(b, filters, t, f - kernel + 1)`."""
        length = self.conv.kernel_size[0] - 1
        x = F.pad(x, (0, 0, length // 2, length - length // 2))
        return self.norm(F.relu(self.conv(x)))


class MusiCNN(nn.Module):
    """musicnn's network in eval mode: log-mel patches `(b, 187, 96)` to logits `(b, 50)` and features `(b, 200)`."""

    def __init__(self, classes: int = len(TAGS)):
        super().__init__()
        self.norm_in = nn.BatchNorm2d(1, eps=1e-3)
        timbral = [Normalized((7, int(share * BANDS)), 204) for share in (0.4, 0.7)]
        temporal = [Normalized((length, 1), 51) for length in (128, 64, 32)]
        self.front = nn.ModuleList([*timbral, *temporal])
        self.middle = nn.ModuleList([Normalized((7, width), 64) for width in (561, 64, 64)])
        self.norm_pool = nn.BatchNorm1d(1506, eps=1e-3)
        self.dense = nn.Linear(1506, 200)
        self.norm_dense = nn.BatchNorm1d(200, eps=1e-3)
        self.out = nn.Linear(200, classes)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.norm_in(rearrange(x, 'b t f -> b 1 t f'))
        x = torch.cat([layer(x).amax(dim=3) for layer in self.front], dim=1)  # (b, 561, t): the loudest of all bands
        seen = [x]
        for number, layer in enumerate(self.middle):
            made = layer(rearrange(x, 'b c t -> b 1 t c'))[..., 0]
            x = made if number == 0 else x + made
            seen.append(x)
        x = torch.cat(seen, dim=1)
        pooled = rearrange(torch.stack((x.amax(dim=2), x.mean(dim=2)), dim=2), 'b c two -> b (c two)')
        features = self.norm_dense(F.relu(self.dense(self.norm_pool(pooled))))
        return self.out(features), features

    def load(self, variables: dict[str, np.ndarray]) -> None:
        """Take the variables of a checkpoint, which are numbered in the order in which the package makes its layers."""
        blocks = [*self.front, *self.middle]
        norms = [self.norm_in, *(it.norm for it in blocks), self.norm_pool, self.norm_dense]
        layers = {f'conv2d{f"_{i}" if i else ""}': it.conv for i, it in enumerate(blocks)}
        layers |= {'dense': self.dense, 'dense_1': self.out}
        given = {}
        for name, layer in layers.items():
            kernel = variables[f'{name}/kernel']
            given[layer.weight] = kernel.transpose(3, 2, 0, 1) if kernel.ndim == 4 else kernel.T
            given[layer.bias] = variables[f'{name}/bias']
        for i, norm in enumerate(norms):
            name = f'batch_normalization{f"_{i}" if i else ""}'
            for own, theirs in dict(weight='gamma', bias='beta', running_mean='moving_mean').items():
                given[getattr(norm, own)] = variables[f'{name}/{theirs}']
            given[norm.running_var] = variables[f'{name}/moving_variance']
        with torch.no_grad():
            for own, value in given.items():
                if own.shape != value.shape:
                    raise ValueError(f'a variable of shape {value.shape} should have {tuple(own.shape)}')
                own.copy_(torch.from_numpy(value.copy()))


class MusicnnJudge:
    """musicnn as an `Embedder`, of its penultimate layer, and as a `Tagger`. A wave gives a frame each 2 s.

    Args:
        place: wheel or folder of the package; see `find_musicnn`.
        model: 'MTT_musicnn', whose tags are `TAGS`.
        batch_size: patches heard at a time.

    Raises:
        FileNotFoundError: no such package. ValueError: weights that do not fit.
    """

    name, sample_rate, dim, tags = 'musicnn', RATE, 200, TAGS
    min_samples = (PATCH - 1) * HOP

    def __init__(self, place: str | Path | None = None, model: str = 'MTT_musicnn', batch_size: int = 16):
        self.network, self.batch_size = MusiCNN(), batch_size
        self.network.load(read_checkpoint(*read_files(find_musicnn(place), model)))
        self.network.eval()

    @torch.no_grad()
    def hear(self, waves: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """Of each wave `(samples,)` at 16 kHz the probabilities `(n, 50)` and features `(n, 200)` of its patches.

        Patches of 3 s begin every 2 s; what is left over at the end is not heard.
        """
        check_waves(self, list(waves))
        found = []
        for wave in waves:
            patches = rearrange(log_mel(wave).unfold(0, PATCH, PATCH_HOP), 'n f t -> n t f')
            made = [self.network(part) for part in patches.split(self.batch_size)]
            found.append((torch.cat([it for it, _ in made]).sigmoid(), torch.cat([it for _, it in made])))
        return found

    def embed(self, waves: list[Tensor]) -> list[Tensor]:
        """See `Embedder.embed`."""
        return [features for _, features in self.hear(waves)]

    def probabilities(self, waves: Sequence[Tensor]) -> Tensor:
        """Mean over the patches of each wave, `(n, 50)`: of each tag by itself, which do not add up to 1."""
        return torch.stack([it.mean(dim=0) for it, _ in self.hear(waves)]) if waves else torch.zeros(0, len(TAGS))

    def first_tags(self, probabilities: Tensor, count: int = 5) -> list[str]:
        """The likeliest of `(50,)`, the likeliest first."""
        return [self.tags[i] for i in probabilities.argsort(descending=True)[:count].tolist()]


# ---- the command ----


def read_music(path: Path, seconds: float | None = None) -> Tensor:
    """A file, or the middle of it, `(samples,)` at 16 kHz."""
    with AudioFile(path) as file:
        wave, rate = file.read(0, len(file)), file.sample_rate
    wave = resample(wave, rate, RATE)
    if seconds is not None and len(wave) > seconds * RATE:
        start = (len(wave) - round(seconds * RATE)) // 2
        wave = wave[start : start + round(seconds * RATE)]
    return wave


def check(judge: MusicnnJudge, folder: Path, most: int = 30) -> None:
    """Print how what each normalization meets in music resembles what it met in training, channel by channel."""
    met: dict[str, list[Tensor]] = {}
    hooks = [
        layer.register_forward_pre_hook(lambda _, given, name=name: met.setdefault(name, []).append(given[0]))
        for name, layer in judge.network.named_modules()
        if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d)
    ]
    paths = [it for it in sorted(folder.rglob('*')) if it.suffix in ('.ogg', '.wav', '.flac', '.mp3')]
    for path in paths[:: max(1, len(paths) // most)]:
        judge.hear([read_music(path, 5.0)])
    for hook in hooks:
        hook.remove()
    for name, layer in judge.network.named_modules():
        if name in met:
            values = rearrange(torch.cat(met[name]), 'b c ... -> c (b ...)')
            mean, spread = values.mean(dim=1), values.std(dim=1)
            kept = layer.running_mean, layer.running_var.sqrt()
            if len(mean) == 1:
                pairs = [f'{here[0]:.3f}, in training {there[0]:.3f}' for here, there in zip((mean, spread), kept)]
                print(f'{name}: mean {pairs[0]}; spread {pairs[1]}')
                continue
            alike = [torch.corrcoef(torch.stack(pair))[0, 1].item() for pair in zip((mean, spread), kept)]
            print(f'{name}: {len(mean)} channels, correlation of means {alike[0]:.3f}, of spreads {alike[1]:.3f}')


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('files', nargs='*', type=Path, help='music to tag')
    parser.add_argument('--musicnn', type=Path, help='wheel or folder of the package')
    parser.add_argument('--check', type=Path, metavar='FOLDER', help='of real music')
    args = parser.parse_args()
    judge = MusicnnJudge(args.musicnn)
    if args.check:
        check(judge, args.check)
    for path in args.files:
        (likely,) = judge.probabilities([read_music(path)])
        shown = ', '.join(f'{tag} {likely[TAGS.index(tag)]:.2f}' for tag in judge.first_tags(likely, 8))
        print(f'{path}: {shown}')


if __name__ == '__main__':
    main()
