"""Train a small MuLaN on sounds made here, then look sounds up by words it has not read and clips it has not heard.

Every pair is synthesised: an instrument in a register at a tempo, and a sentence that says so. No downloads, one or two
minutes on two cores.

    python examples/retrieval_demo.py
"""

import argparse
import itertools
import math
import random
import time

import torch

from musiclm_pytorch import MuLaN, TextTransformer, create_optimized_audiospectrogram_transformer

SAMPLE_RATE = 8000
SECONDS = 2.0

INSTRUMENTS = {
    'flute': ('flute', 'breathy flute', 'wooden flute'),
    'organ': ('organ', 'church organ', 'pipe organ'),
    'guitar': ('guitar', 'plucked guitar', 'acoustic guitar'),
    'bell': ('bell', 'ringing bell', 'metal bell'),
}
REGISTERS = {'low': ('low', 'deep', 'bass'), 'middle': ('middle', 'medium', 'mid-range'), 'high': ('high', 'treble')}
TEMPI = {'slow': ('slow', 'calm', 'unhurried'), 'fast': ('fast', 'quick', 'rapid')}
CLASSES = list(itertools.product(INSTRUMENTS, REGISTERS, TEMPI))

TRAINING_SENTENCES = (
    'a {tempo} {instrument} melody, {register}',
    '{register} notes of a {instrument}, {tempo}',
    'someone plays a {instrument}, {tempo} and {register}',
    '{tempo} music for {instrument} in the {register} register',
)
HELD_OUT_SENTENCES = ('the {instrument} plays {register} and {tempo} tones', '{register} {instrument} tune, {tempo}')

# partials as (multiple of the pitch, loudness), decay in 1 / seconds, share of breath noise
TIMBRES = {
    'flute': (((1, 1.0), (2, 0.2)), 0.5, 0.05),
    'organ': (((1, 1.0), (2, 0.8), (3, 0.6), (4, 0.6), (6, 0.4), (8, 0.3)), 0.0, 0.0),
    'guitar': (tuple((k, 1 / k) for k in range(1, 9)), 6.0, 0.0),
    'bell': (((1, 1.0), (2.76, 0.7), (5.4, 0.5), (8.93, 0.3)), 3.0, 0.0),
}
LOWEST_NOTES = {'low': 36, 'middle': 54, 'high': 72}  # MIDI
NOTES_PER_SECOND = {'slow': 1.5, 'fast': 5.0}


def note(instrument: str, pitch: int, seconds: float, rng: random.Random) -> torch.Tensor:
    """One note, `(samples,)`; the pitch is a MIDI number."""
    partials, decay, breath = TIMBRES[instrument]
    hertz = 440 * 2 ** ((pitch - 69) / 12)
    t = torch.arange(int(seconds * SAMPLE_RATE)) / SAMPLE_RATE
    wave = breath * torch.randn(len(t))
    for multiple, loudness in partials:
        if hertz * multiple < SAMPLE_RATE / 2:
            wave = wave + loudness * torch.sin(2 * math.pi * (hertz * multiple * t + rng.random()))
    attack = (t / 0.02).clamp(max=1.0)
    release = ((seconds - t) / 0.02).clamp(max=1.0)
    return wave * attack * release * torch.exp(-decay * t)


def clip(kind: tuple[str, str, str], rng: random.Random) -> torch.Tensor:
    """A random melody of one kind, `(samples,)`."""
    instrument, register, tempo = kind
    notes_per_second = NOTES_PER_SECOND[tempo] * rng.uniform(0.9, 1.1)
    scale = [0, 2, 4, 5, 7, 9, 11, 12]
    notes = [
        note(instrument, LOWEST_NOTES[register] + rng.choice(scale), 1 / notes_per_second, rng)
        for _ in range(math.ceil(SECONDS * notes_per_second) + 1)
    ]
    start = rng.randrange(len(notes[0]))
    wave = torch.cat(notes)[start : start + int(SECONDS * SAMPLE_RATE)]
    return wave / wave.abs().max() * rng.uniform(0.3, 0.9)


def caption(kind: tuple[str, str, str], sentences: tuple[str, ...], rng: random.Random) -> str:
    instrument, register, tempo = kind
    return rng.choice(sentences).format(
        instrument=rng.choice(INSTRUMENTS[instrument]),
        register=rng.choice(REGISTERS[register]),
        tempo=rng.choice(TEMPI[tempo]),
    )


def pairs(seed: int, sentences: tuple[str, ...]) -> tuple[torch.Tensor, list[str]]:
    """One clip and one caption of every kind."""
    rng = random.Random(seed)
    return torch.stack([clip(kind, rng) for kind in CLASSES]), [caption(kind, sentences, rng) for kind in CLASSES]


def build() -> MuLaN:
    audio = create_optimized_audiospectrogram_transformer(
        dim=128, depth=2, heads=4, dim_head=32, use_case='music', audio_sample_rate=SAMPLE_RATE, spec_n_mels=64
    )
    return MuLaN(audio_transformer=audio, text_transformer=TextTransformer(dim=128, depth=2, heads=4, dim_head=32))


def train(mulan: MuLaN, steps: int) -> None:
    optimizer = torch.optim.AdamW(mulan.parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-3, total_steps=steps, pct_start=0.1)
    start = time.perf_counter()
    mulan.train()
    for step in range(1, steps + 1):
        wavs, texts = pairs(seed=step, sentences=TRAINING_SENTENCES)
        loss = mulan(wavs, raw_texts=texts)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(mulan.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step == 1 or step % 50 == 0:
            print(f'step {step:4d}   loss {loss.item():6.3f}   {time.perf_counter() - start:5.1f} s')


@torch.no_grad()
def evaluate(mulan: MuLaN, repeats: int = 10) -> dict[str, float]:
    """Share of held-out sentences whose clip ranks first, and shares of their attributes that it gets right."""
    mulan.eval()
    found = torch.zeros(4)
    for repeat in range(repeats):
        wavs, texts = pairs(seed=-1 - repeat, sentences=HELD_OUT_SENTENCES)
        best = mulan(wavs, raw_texts=texts, return_pairwise_similarities=True).argmax(dim=0)
        for asked, answer in zip(CLASSES, best.tolist()):
            attributes = [a == b for a, b in zip(asked, CLASSES[answer])]
            found += torch.tensor([all(attributes), *attributes])
    names = ('R@1', 'instrument', 'register', 'tempo')
    return dict(zip(names, (found / (repeats * len(CLASSES))).tolist()))


@torch.no_grad()
def show(mulan: MuLaN) -> None:
    """Look three sentences up among clips of every kind."""
    wavs, _ = pairs(seed=-99, sentences=HELD_OUT_SENTENCES)
    audio = mulan.get_audio_latents(wavs)
    for query in ('a deep organ, calm', 'quick treble bell tune', 'the acoustic guitar plays medium and rapid tones'):
        scores = (audio @ mulan.get_text_latents(raw_texts=[query])[0]).topk(3)
        print(f'\n"{query}"')
        for score, index in zip(scores.values.tolist(), scores.indices.tolist()):
            print(f'    {score:.2f}  {" · ".join(CLASSES[index])}')


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--steps', type=int, default=500, help='training steps (default 500)')
    steps = parser.parse_args().steps

    torch.manual_seed(0)
    mulan = build()
    parameters = sum(p.numel() for p in mulan.parameters()) / 1e6
    print(f'{len(CLASSES)} kinds of clips of {SECONDS:.0f} s, a MuLaN of {parameters:.1f} million parameters\n')
    print('before training:', ', '.join(f'{name} {share:.0%}' for name, share in evaluate(mulan).items()))
    train(mulan, steps)
    print(
        '\nheld-out clips and sentences:', ', '.join(f'{name} {share:.0%}' for name, share in evaluate(mulan).items())
    )
    print(f'(chance: R@1 {1 / len(CLASSES):.0%}, instrument 25%, register 33%, tempo 50%)')
    show(mulan)


if __name__ == '__main__':
    main()
