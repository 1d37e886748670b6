"""The tables of figures in README, pages and the model's card, made of what the benchmarks wrote: docs/figures/*.json.

    python docs/tables.py            # puts each between its marks, <!-- table: NAME --> and <!-- end of table -->

To show a new run, copy the JSON that its script wrote (`--out`, or build/benchmarks) to docs/figures and run this.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
FIGURES = ROOT / 'docs' / 'figures'
CARDS = [ROOT / f'musiclm_pytorch/pretrained/{name}/README.md' for name in ('tiny', 'small')]
PAGES = [ROOT / 'README.md', *sorted((ROOT / 'docs').glob('*.md')), *CARDS]
MARKED = re.compile(r'<!-- table: (\w+) -->\n.*?<!-- end of table -->', re.DOTALL)


def figures(name: str) -> dict[str, Any]:
    return json.loads((FIGURES / f'{name}.json').read_text(encoding='utf-8'))


def table(head: Sequence[str], rows: Iterable[Sequence[Any]], right: bool = False) -> str:
    rule = ['---', *(['---:' if right else '---'] * (len(head) - 1))]
    return '\n'.join(f'| {" | ".join(map(str, row))} |'.replace('|  |', '| |') for row in (head, rule, *rows))


def measured(name: str) -> str:
    """What was run, on what, when."""
    found = figures(name)
    return f'(`{found["command"]}`, {told(found["machine"])}{found["date"]})'


def told(machine: dict[str, Any]) -> str:
    """What is known of a machine, with a comma behind it."""
    parts = {'processor': '{}', 'cores': '{} cores', 'threads': '{} threads', 'torch': 'torch {}'}
    known = [text.format(str(machine[key]).partition('+')[0]) for key, text in parts.items() if key in machine]
    return ''.join(f'{it}, ' for it in known).replace('1 threads', 'one thread')


def bold(figure: float, digits: int = 1) -> str:
    return f'**{figure:.{digits}f}**'


def percent(share: float, digits: int = 1) -> str:
    return f'{share:.{digits}%}'.replace('%', ' %')


def span(value: dict[str, float], show: Any = '{:.3f}'.format) -> str:
    return f'{show(value["value"])} ({show(value["low"])} to {show(value["high"])})'


# ---- speed ----


def optimizers() -> str:
    rows = figures('optimizers')['rows']
    names = dict.fromkeys(row['optimizer'] for row in rows)
    best = [min((row for row in rows if row['optimizer'] == name), key=lambda row: row['loss']) for name in names]
    body = [[row['optimizer'], row['lr'], f'{row["loss"]:.2f}', f'{row["step_seconds"]:.2f} s'] for row in best]
    head = ['optimizer', 'the best of its learning rates', 'nats a code, held out', 'a step']
    return f'{measured("optimizers")}\n\n{table(head, body)}'


def speed() -> str:
    """The README's: the case of each script that tells most."""
    mulan = {it['case']: it for it in figures('mulan')['cases']}
    rows = []
    for case, title in {'train:3:4': 'a training step of MuLaN, 3 s × 4', 'embed:10:4': 'embedding 10 s × 4'}.items():
        theirs, ours = mulan[case]['upstream'], mulan[case]['ours']
        ratio, share = theirs['seconds'] / ours['seconds'], ours['peak_gb'] / theirs['peak_gb']
        both = [f'{it["seconds"]:.2f} s, {it["peak_gb"]:.2f} GB' for it in (theirs, ours)]
        rows.append([title, *both, f'{bold(ratio)} times as fast, {bold(share, 2)} of the memory'])
    step = next(it for it in figures('stages')['rows'] if it['stage'] == 'semantic')
    seconds = step['step_seconds']
    title = f'a training step of the semantic stage, {step["seconds"]:g} s'
    rows.append(
        [title, f'{seconds["upstream"]:.1f} s', f'{seconds["ours"]:.2f} s', f'{bold(step["ratios"]["ours"])} times']
    )
    whole = figures('generation')['all, fine in windows of 3 s']
    theirs = f'{whole["upstream"]:.0f} s (extrapolated)'
    rows.append(['4 samples of 6 s', theirs, f'{whole["ours"]:.2f} s', f'{bold(whole["ratio"], 0)} times'])
    stream = figures('streaming')
    dates = ' and '.join(dict.fromkeys(figures(it)['date'] for it in ('mulan', 'stages', 'generation')))
    return (
        f'{table(["", "upstream", "here", "ratio"], rows)}\n\n'
        f'Two cores of an AMD EPYC with AVX-512, {dates}. `tiny` makes {stream["seconds"]:g} s of music in '
        f'{stream["call_seconds"]:.1f} s,\nand streams at {stream["real_time_factor"]:.1f} times the pace at which '
        f'it is heard (one thread, {stream["date"]}). No figure of a GPU was measured.'
    )


def mulan() -> str:
    found, rows = figures('mulan'), []
    limit = f'more than {found["memory_limit_gb"]:g} GB'
    for row in found['cases']:
        what, seconds, batch = row['case'].split(':')
        cells = [f'{"training step" if what == "train" else "embedding"}, {seconds} s × {batch}']
        for key, unit in (('seconds', 's'), ('peak_gb', 'GB')):
            sides = theirs, ours = [row[side] and row[side][key] for side in ('upstream', 'ours')]
            cells += [f'{it:.2f} {unit}' if it else limit for it in sides]
            cells.append('–' if theirs is None else bold(theirs / ours) if key == 'seconds' else bold(ours / theirs, 2))
        rows.append(cells)
    head = ['case', 'upstream', 'here', 'times as fast', 'upstream, peak', 'here, peak', 'share of the memory']
    agreed = ', '.join(f'{name} to {error:.0e}'.replace('e-0', 'e-') for name, error in found['agreement'].items())
    told = f'Both sides run on the same weights and inputs and have to agree first: {agreed}.'
    return f'{told}\n{measured("mulan")}\n\n{table(head, rows)}'


def generation() -> str:
    found, rows = figures('generation'), []
    titles = {
        'semantic': 'semantic, 150 tokens',
        'coarse': 'coarse, 300 frames',
        'fine 150': 'fine, 150 frames',
        'all, fine in windows of 3 s': '4 samples of 6 s, all stages, fine windows of 3 s',
        'all, fine in one piece': 'the same, fine stage in one piece',
    }
    for name, title in titles.items():
        it, whole = found[name], found[name].get('extrapolated')
        theirs = f'{it["upstream"]:.0f} s (extrapolated)' if whole else f'{it["upstream"]:.1f} s'
        rows.append([title, theirs, f'{it["ours"]:.2f} s', bold(it['ratio'], 0 if whole else 1)])
    one, four = found['1 rows'], found['4 rows']
    tokens = [
        ['one sample', f'{one["token_100_ms"]:.1f} ms', percent(one['share_of_floor'], 0), f'{one["growth"]:.2f}'],
        ['four samples', f'{four["token_100_ms"]:.1f} ms', '–', f'{four["growth"]:.2f}'],
    ]
    head = ['a token of the coarse stage', 'after 100 tokens', 'of the speed at which memory copies the weights']
    return (
        f"Both sides' logits agree to {max(found['agreement'].values()):.0e} of their spread.\n".replace('e-0', 'e-')
        + f'{measured("generation")}\n\n{table(["", "upstream", "here", "times as fast"], rows)}\n\n'
        f'{table([*head, "times as long after 1,500"], tokens)}'
    )


def stages() -> str:
    rows = []
    for row in figures('stages')['rows']:
        seconds, ratios = row['step_seconds'], row['ratios']
        cells = [row['stage'], f'{row["seconds"]:g} s', f'{seconds["upstream"]:.1f} s']
        for side in ('ours', 'ours-bf16'):
            cells += [f'{seconds[side]:.2f} s', bold(ratios[side])]
        rows.append(cells)
    head = ['stage', 'crop', 'audiolm-pytorch', 'here, float32', 'ratio', 'here, bf16', 'ratio']
    return f'{measured("stages")}\n\n{table(head, rows)}'


def scaling_steps() -> str:
    steps = figures('scaling')['steps']
    sides = [{it['world']: it for it in steps if bool(it['fields']) is sharded} for sharded in (False, True)]
    rows = [
        [
            world,
            *(
                cell
                for it in sides
                for cell in (f'{it[world]["seconds_a_step"]:.3f}', f'{it[world]["pairs_a_second"]:.0f}')
            ),
        ]
        for world in sides[0]
    ]
    head = ['processes', 'DDP, s a step', 'DDP, pairs/s', 'FSDP, s a step', 'FSDP, pairs/s']
    told = f'{steps[0]["batch_a_process"]} pairs a process, {steps[0]["gradient_mib"]:.1f} MiB of gradients.'
    return f'{told}\n{measured("scaling")}\n\n{table(head, rows, right=True)}'


def scaling_loss() -> str:
    found: dict[tuple[int, int], list[float]] = {}
    for it in figures('scaling')['loss']:
        found.setdefault((it['local'], it['total']), []).append(it['peak_bytes'] / 2**20)
    rows = [
        [local, f'{total:,}', *(f'{it:.{0 if it >= 10 else 1}f} MiB' for it in peaks)]
        for (local, total), peaks in found.items()
    ]
    return table(['own pairs B', 'all pairs', 'softmax, decoupled', 'sigmoid'], rows, right=True)


def inference() -> str:
    names = dict(auto="what `'auto'` chooses, bf16 here")
    rows = [
        [
            names.get(it['name'], it['name']),
            f'{it["seconds"]:.2f}',
            f'{it["plain_seconds"]:.2f}',
            bold(it['times_plain']),
            f'{it["peak_mb"]:,.0f} MB',
            f'{it["cosine"]:.5f}',
        ]
        for it in figures('inference')['combinations']
    ]
    head = ['', 's', 'plain, s', 'times plain', 'memory', 'smallest cosine to float32']
    return f'{measured("inference")}\n\n{table(head, rows)}'


def memory() -> str:
    found, rows = figures('memory'), []
    for case, it in found['rows'].items():
        pairs, _, chunk = case.partition(':')
        how = (
            f'{pairs} pairs'
            if case == '32'
            else f'{pairs} pairs, in chunks of {chunk}'
            if chunk
            else f'{pairs} pairs at once'
        )
        rows.append([how, f'{it["peak"]:.2f} GB'])
    head = [f'clips of {found["seconds"]:g} s', 'peak memory']
    return f'{measured("memory")}\n\n{table(head, rows)}'


def service() -> str:
    titles = {
        'clients: 1': '1 client',
        'clients: 50': '50 clients',
        'no service, one by one': 'the model without a service, one text after another',
        'no service, one call': 'and all in one call',
    }
    found, rows = figures('service'), []
    for name, title in titles.items():
        it = found[name]
        times = [f'{it[key]:.{1 if it[key] < 20 else 0}f} ms' if key in it else '' for key in ('median_ms', 'p95_ms')]
        rows.append([title, f'{it["per_second"]:,.0f} ({it["lowest"]:,.0f} to {it["highest"]:,.0f})', *times])
    return f'{measured("service")}\n\n{table(["", "requests a second", "an answer, median", "95 %"], rows)}'


# ---- what it sounds like ----


def obedience() -> str:
    found = figures('obedience')
    asked = ['instrument', 'tempo', 'register', 'drums']
    rows = [[title, *(percent(it[name]) for name in asked)] for title, it in found['rows'].items()]
    rows.append(['chance', '12.5 %', '33.3 %', '33.3 %', '50.0 %'])  # of 8, 3, 3 and 2
    head = [f'{found["prompts"]} prompts in held-out phrasings', *asked]
    return f'{measured("obedience")}\n\n{table(head, rows)}'


SMALL = {
    'real held-out audio: the judge itself': 'real held-out audio of all three fonts: the judge itself',
    'real audio of the same labels': 'real audio of the same labels, a font that the model never heard',
    'the same by the fonts that the model was trained on': 'the same by the fonts that it was trained on',
    'real audio through the codec: the ceiling': 'real audio of the unheard font through the codec',
    'real semantic tokens, the coarse stage': 'real semantic tokens of the unheard font, the coarse stage',
    'without ranking and guidance': 'without ranking and guidance',
    'without ranking': 'without ranking',
    'the best of 4 by MuLaN': 'the best of 4 by MuLaN',
}


def obedience_small(shown: Sequence[str] = tuple(SMALL)) -> str:
    found, asked = figures('obedience_small'), ['instrument', 'family', 'tempo', 'register', 'drums']
    rows = [[SMALL[name], *(percent(found['rows'][name][it]) for it in asked)] for name in shown]
    rows.append(['chance', '5.6 %', '12.5 %', '33.3 %', '33.3 %', '50.0 %'])
    head = [f'{found["prompts"]} prompts', 'instrument of 18', 'family of 8', 'tempo', 'register', 'drums']
    return f'{measured("obedience_small")}\n\n{table(head, rows)}'


def obedience_small_music() -> str:
    return obedience_small([it for it in SMALL if 'judge' not in it and 'codec' not in it and 'guidance' not in it])


def own_words() -> str:
    found, asked = figures('own_words'), ['instrument', 'tempo', 'drums', 'unknown']
    told = {**found['earlier'], 'as it ships': found['models']['small']['right'], 'chance': found['chance']}
    rows = [[title, *(percent(it[name]) if name in it else '' for name in asked)] for title, it in told.items()]
    head = [f'{found["prompts"]} prompts, best of {found["samples"]}', *asked[:3], 'a word that it does not know']
    return f'{measured("own_words")}\n\n{table(head, rows)}'


def sampled_music() -> str:
    titles = {
        'real clips, as asked of small': 'real clips of the unheard font',
        'small: through its codec': 'those through the codec',
        'small: real semantic tokens, its other stages': 'their semantic tokens, the coarse stage',
        'small, the best of 4': 'the best of 4 by MuLaN',
        'tiny, the best of 4': 'the best of 4 of `tiny`',
    }
    found, asked = figures('sampled_music'), ['instrument', 'family', 'tempo', 'register', 'drums']
    rows = [
        [title, *(percent(it[name]['value']) for name in asked), f'{it["fad"]:.1f}']
        for title, it in ((title, found['rows'][name]) for name, title in titles.items())
    ]
    head = [f'{found["prompts"]} prompts', *asked, 'FAD']
    return f'{measured("sampled_music")}\n\n{table(head, rows)}'


def sampled_mulan() -> str:
    rows = figures('sampled_mulan')['rows']
    sides = [rows['a font that it never met'], rows['its own fonts']]
    body = [[name, *(percent(side[name]['small']['value']) for side in sides)] for name in sides[0]]
    other = [
        [name, percent(it['small']['value']), f'{it["small"]["count"]} crops']
        for name, it in rows['recordings'].items()
    ]
    return (
        f'{measured("sampled_mulan")}\n\n{table(["", "a font that it never met", "its own fonts"], body)}\n\n'
        f'{table(["real recordings, 5 s", "right", "of"], other)}'
    )


def memorised() -> str:
    rows = []
    for tokens, it in figures('obedience')['memorised'].items():
        exact, near = it['exact'], it['approximate']
        costs = f'{near["median_cost"]:.1f}, {near["median_cost_of_negatives"]:.1f}'
        rows.append([tokens, span(exact, percent), span(near, percent), percent(it['same_token']['value']), costs])
    head = ['tokens given, of 62', 'exactly the clip', 'nearly', 'tokens equal', 'median cost, of strangers']
    return table(head, rows)


def prompt_scores() -> str:
    found, titles = figures('prompt_scores'), dict(valid='held-out captions', nonsense='three words of random letters')
    rows = [
        [title, *(f'{it["mean"]:.3f}, {percent(it["below"], 0)}' for it in found['rows'] if it['prompts'] == kind)]
        for kind, title in titles.items()
    ]
    head = [f'{found["prompts"]} prompts each, music of 5 s', f'best of 1: mean, below {found["usual"]}']
    return f'{measured("prompt_scores")}\n\n{table([*head, "best of 2", "best of 4"], rows)}'


def separation() -> str:
    titles = dict(codec='real, through the codec', model='`tiny`')
    titles |= {'real, noise 0 dB below': 'real, noise as loud', 'real, noise -10 dB below': 'real, noise 10 dB above'}
    distances = ['frechet_audio_distance', 'frechet_infinity', 'kernel_audio_distance']
    rows = [
        [titles.get(name, name), *(f'{it[key]:.3f}' for key in distances), span(it['cosine']), span(it['recall_at_1'])]
        for name, it in figures('separation')['sets'].items()
    ]
    return f'{measured("separation")}\n\n{table(["set", "FAD", "FAD∞", "KAD", "cosine with the text", "R@1"], rows)}'


def structure() -> str:
    found, settings = figures('structure'), ['5 s, 16 kHz', '10 s, 22.05 kHz']
    titles = dict(
        key_exact='key, tonic and mode exactly',
        tempo_4='tempo within 4 %, half and double wrong',
        beats='beats, F-measure within 70 ms',
    )
    rows = [[title, *(percent(found[it]['scores'][key]['value']) for it in settings)] for key, title in titles.items()]
    head = [f'{found["clips"]} held-out clips each', *settings]
    return f'{measured("structure")}\n\n{table(head, rows)}'


def codecs() -> str:
    keys = {
        'mel distance to 8 kHz, dB': 2,
        'to 12 kHz, dB': 2,
        'ViSQOL': 2,
        'decoding, × real time': 0,
    }
    titles = dict(shipped='`SpectralCodec` of `tiny`, 16 kHz', NeuralCodec='`NeuralCodec`, 24 kHz')
    rows = [
        [
            titles.get(it['codec'], it['codec']),
            it['set'],
            f'{it["kbit/s"]:.1f}',
            *(f'{it[key]:.{n}f}' for key, n in keys.items()),
        ]
        for it in figures('codecs')['rows']
    ]
    return f'{measured("codecs")}\n\n{table(["", "music", "kbit/s", *keys], rows)}'


def damage() -> str:
    rows = figures('damage')['rows']
    outcomes = [*next(iter(rows.values()))]
    total = [sum(row[it] for row in rows.values()) for it in outcomes]
    body = [[kind, *row.values()] for kind, row in rows.items()] + [[f'all {sum(total):,}', *total]]
    return f'{measured("damage")}\n\n{table(["kind", *outcomes], body, right=True)}'


def benchmarks() -> str:
    """Every run that a page shows."""
    pages = sorted(PAGES, key=lambda it: it.parent.name == 'docs')  # of several, a page of the site is told
    marks = {name: page for page in pages for name in MARKED.findall(page.read_text(encoding='utf-8'))}
    rows = []
    for path in sorted(FIGURES.glob('*.json')):
        found = figures(path.stem)
        machine, page = found['machine'], marks[SHOWN.get(path.stem, path.stem)]
        where = 'README' if page == ROOT / 'README.md' else f'the card of {page.parent.name}'
        where = f'[{page.stem}]({page.name})' if page.parent.name == 'docs' else where
        what = told({key: machine[key] for key in ('processor', 'cores') if key in machine}).rstrip(', ')
        script = re.search(r'\w+\.py', found['command'])[0]
        rows.append([f'`{script}`', where, found['date'], what, 'rounded' if 'note' in found else 'whole'])
    return table(['script', 'shown in', 'date', 'machine', 'JSON'], rows)


SHOWN = dict(scaling='scaling_steps', streaming='speed', obedience_small='obedience_small_music')
TABLES = [speed, optimizers, mulan, generation, stages, scaling_steps, scaling_loss, inference, memory, service]
TABLES += [obedience_small, obedience_small_music, own_words, sampled_music, sampled_mulan]
TABLES += [obedience, memorised, prompt_scores, separation, structure, codecs, damage, benchmarks]


def filled(text: str) -> str:
    """A page with its tables as the JSON has them.

    Raises KeyError for a mark that names no table.
    """
    made = {it.__name__: it for it in TABLES}

    def fill(mark: re.Match) -> str:
        return f'<!-- table: {mark[1]} -->\n\n{made[mark[1]]()}\n\n<!-- end of table -->'

    return MARKED.sub(fill, text)


def main() -> None:
    for page in PAGES:
        before = page.read_text(encoding='utf-8')
        if (after := filled(before)) != before:
            page.write_text(after, encoding='utf-8')
            print(page.relative_to(ROOT))


if __name__ == '__main__':
    main()
