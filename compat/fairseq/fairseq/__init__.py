"""A stand-in for fairseq: the part of `fairseq.checkpoint_utils` that audiolm-pytorch calls, for HuBERT.

Importing it costs no more than torch; transformers is imported when a model is built.
"""

from fairseq import checkpoint_utils
from fairseq.inert import register_safe_globals

__version__ = '0.12.2+musiclm.1'
__all__ = ['checkpoint_utils']

# At import, because audiolm-pytorch calls torch.load on a checkpoint before it calls anything of ours.
register_safe_globals()
