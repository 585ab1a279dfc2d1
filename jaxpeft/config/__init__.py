"""A run's configuration: dataclasses whose fields are the flags of `train`. Nothing heavy is imported here."""

from jaxpeft.config.adapter import AdapterConfig, PruningConfig
from jaxpeft.config.contextual import ContextualConfig
from jaxpeft.config.data import DataConfig
from jaxpeft.config.embedding import EmbeddingConfig
from jaxpeft.config.model import ModelConfig
from jaxpeft.config.run import RunConfig
from jaxpeft.config.training import ClusterConfig, EvaluationConfig, TrainingConfig

__all__ = [
    "AdapterConfig",
    "ClusterConfig",
    "ContextualConfig",
    "DataConfig",
    "EmbeddingConfig",
    "EvaluationConfig",
    "ModelConfig",
    "PruningConfig",
    "RunConfig",
    "TrainingConfig",
]
