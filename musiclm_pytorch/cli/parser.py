"""The parser of the command line: errors in a line with what was meant, and completion. Loads nothing heavy."""

from __future__ import annotations

import argparse
import difflib
import os
import re
import sys
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

CHOICE = re.compile(r"invalid choice: '(.*?)'")


class Parser(argparse.ArgumentParser):
    """Tells what is wrong in one line: the nearest that there is, and where the rest is told."""

    words: Sequence[str] = ()  # what it was given

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> tuple[Any, list[str]]:
        self.words = sys.argv[1:] if args is None else [*args]
        namespace, unknown = super().parse_known_args(args, namespace)
        if unknown:  # told here, by the subcommand that does not know them
            self.error(f'unrecognized arguments: {" ".join(unknown)}')
        return namespace, unknown

    def error(self, message: str) -> NoReturn:
        told = [message, *self.meant(message), f'{self.prog} --help tells what it takes']
        self.exit(2, f'{self.prog}: error: {" ".join("; ".join(told).split())}\n')

    def meant(self, message: str) -> list[str]:
        """A hint for each option that is none, and for a value that is no choice."""
        options = [it for action in self._actions for it in action.option_strings]
        choices = [it for action in self._actions for it in action.choices or ()]
        names = [it.partition('=')[0] for it in self.words[: (*self.words, '--').index('--')] if it.startswith('--')]
        unknown = [it for it in names if not any(option.startswith(it) for option in options)]
        wrong = [*((it, options) for it in unknown), *((it, choices) for it in CHOICE.findall(message))]
        hints = []
        for word, known in wrong:
            if close := difflib.get_close_matches(word, [it for it in known if isinstance(it, str)], n=1):
                hints.append(f'{word}: did you mean {close[0]}?')
        return hints


# ---- completion ----


def models_that_ship(**_: Any) -> list[str]:
    from musiclm_pytorch.pretrained import pretrained_names

    return pretrained_names()


def recipes_that_ship(**_: Any) -> list[str]:
    from musiclm_pytorch.trainer.config import shipped_recipes

    return [*shipped_recipes()]


def or_a_path(names: Any) -> Any:
    """A completer of names, and of paths."""

    def complete(prefix: str, **rest: Any) -> Iterable[str]:
        from argcomplete.completers import FilesCompleter

        return [*names(), *FilesCompleter()(prefix, **rest)]

    return complete


def complete(parser: Parser) -> None:
    """Answer the shell that asks what may come next, if one does, and end."""
    if '_ARGCOMPLETE' not in os.environ:
        return
    import argcomplete

    class Finder(argcomplete.CompletionFinder):
        def collect_completions(self, active_parsers: Any, parsed_args: Any, cword_prefix: str) -> list[str]:
            found = super().collect_completions(active_parsers, parsed_args, cword_prefix)
            parser = active_parsers[-1]
            # signatures of models tell the keys, which takes a while: only where nothing else is meant
            if cword_prefix.startswith('--') and parser.get_default('takes_fields') and not found:
                from musiclm_pytorch.trainer.pipeline_recipe import list_keys

                part = parser.prog.split()[-1]
                lines = list_keys(None if part in ('all', 'assemble') else part)
                found = [it for line in lines if (it := f'--{line.partition(":")[0]}').startswith(cword_prefix)]
            return found

    Finder()(parser)
