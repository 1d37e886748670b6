"""How to install an extra. Imports nothing."""


def how_to_install(extra: str) -> str:
    """The command that adds an extra. By the project's name, pip would take an older release from an index."""
    return f"pip install '.[{extra}]' in the source folder of musiclm-pytorch"
