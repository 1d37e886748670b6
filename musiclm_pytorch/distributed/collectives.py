"""`AllGather` under its path of 0.2.8, `musiclm_pytorch.distributed`."""

from musiclm_pytorch.collectives import AllGather as AllGather
