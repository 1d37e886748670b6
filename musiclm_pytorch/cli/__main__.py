from musiclm_pytorch.cli.entry import run

run()
