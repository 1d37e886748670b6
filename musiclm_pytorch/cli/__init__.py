"""The command `musiclm`."""

from musiclm_pytorch.cli.entry import main as main
from musiclm_pytorch.cli.entry import run as run
