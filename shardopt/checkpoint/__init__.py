"""Save and load sharded state: per-parameter flat vectors, of which each rank writes and reads its ranges.

What any engine wrote on any number of ranks, any other may read on any other number.
"""

from shardopt.checkpoint.blocks import DamagedError
from shardopt.checkpoint.document import read_document
from shardopt.checkpoint.export import export_safetensors
from shardopt.checkpoint.folders import latest
from shardopt.checkpoint.keep import Keep
from shardopt.checkpoint.loading import load, load_extras
from shardopt.checkpoint.saver import Saver
from shardopt.checkpoint.saving import save
from shardopt.checkpoint.verify import find_damage, latest_intact

__all__ = [
    "DamagedError",
    "Keep",
    "Saver",
    "export_safetensors",
    "find_damage",
    "latest",
    "latest_intact",
    "load",
    "load_extras",
    "read_document",
    "save",
]
