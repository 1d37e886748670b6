"""The command `musiclm`."""

from musiclm_pytorch.cli.entry import main as main
