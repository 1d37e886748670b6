from .collectives import AllGather as AllGather
from .config import DistributedConfig as DistributedConfig
from .config import create_distributed_config as create_distributed_config
from .trainer import DistributedMuLaNTrainer as DistributedMuLaNTrainer
from .trainer import run_distributed_training as run_distributed_training
