"""The command `musiclm`. A subcommand is a function that declares its options and names the one that does its work."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence

from musiclm_pytorch.version import __version__


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code: 0, or 2 after an error of the user's, told in a line on stderr."""
    parser = argparse.ArgumentParser(prog='musiclm', description='Music and text: data, training, generation.')
    parser.add_argument('--version', action='version', version=f'musiclm-pytorch {__version__}')
    subcommands = parser.add_subparsers(dest='command', required=True, metavar='COMMAND')
    for declare in SUBCOMMANDS:
        declare(subcommands)
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format='%(message)s')
    try:
        options.run(options)
    except (OSError, ValueError, ImportError) as error:
        print(f'musiclm {options.command}: error: {" ".join(str(error).split())}', file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f'musiclm {options.command}: interrupted', file=sys.stderr)
        return 130
    return 0


def shard(subcommands) -> None:
    """`musiclm shard`: a folder, a manifest or MusicCaps to tar files."""
    parser = subcommands.add_parser(
        'shard',
        help='pack audio and captions into tar shards',
        description='Pack audio and captions into tar shards of the WebDataset format. Interrupted, the same command '
        'goes on where it was.',
    )
    parser.add_argument('source', metavar='SOURCE', help='a folder, a .csv or .jsonl manifest, or the CSV of MusicCaps')
    parser.add_argument('-o', '--output', metavar='FOLDER', required=True, help='where the shards go')
    parser.add_argument(
        '--audio-folder', metavar='FOLDER', help='SOURCE is the CSV of MusicCaps, and its audio lies in this folder'
    )
    parser.add_argument(
        '--shard-size', metavar='N', type=int, default=1000, help='clips a shard (default: %(default)s)'
    )
    parser.set_defaults(run=run_shard)


def run_shard(options: argparse.Namespace) -> None:
    from musiclm_pytorch.data.shard_writer import write_shards
    from musiclm_pytorch.data.sources import list_clips

    listing = list_clips(options.source, options.audio_folder)
    for name, reason in listing.skipped.items():
        logging.getLogger(__name__).warning('skipped %s: %s', name, reason)
    index = write_shards(
        listing,
        options.output,
        shard_size=options.shard_size,
        on_shard=lambda number, count: print(f'shard {number} of {count}', flush=True),
    )
    clips, shards = (sum(it) for it in zip(*((shard['samples'], shard['samples'] > 0) for shard in index['shards'])))
    print(f'{clips} clips in {shards} shards under {options.output}; {len(index["skipped"])} skipped')


SUBCOMMANDS = [shard]

if __name__ == '__main__':
    sys.exit(main())
