"""MuLaN as a model that open_clip's own code trains, evaluates and saves (https://github.com/mlfoundations/open_clip)."""

from musiclm_pytorch.open_clip.model import AudioBatch, MuLaNOpenCLIP, create_mulan_open_clip_model
from musiclm_pytorch.open_clip.training import (
    OpenCLIPData,
    create_open_clip_arguments,
    create_open_clip_data,
    create_open_clip_loss,
)

__all__ = [
    'AudioBatch',
    'MuLaNOpenCLIP',
    'OpenCLIPData',
    'create_mulan_open_clip_model',
    'create_open_clip_arguments',
    'create_open_clip_data',
    'create_open_clip_loss',
]
