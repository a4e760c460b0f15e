"""Text to batches: sources, tokenizer, packed blocks, and the samples of a step."""

from shardopt.pretrain.data.batches import HoldoutData, TrainData
from shardopt.pretrain.data.build import prepare
from shardopt.pretrain.data.config import DataConfig
from shardopt.pretrain.data.prefetch import Batches
from shardopt.pretrain.data.report import describe
from shardopt.pretrain.data.sources import check_sources

__all__ = ["Batches", "DataConfig", "HoldoutData", "TrainData", "check_sources", "describe", "prepare"]
