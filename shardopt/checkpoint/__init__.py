"""Save and load sharded state: per-parameter flat vectors, of which each rank writes and reads its ranges.

What any engine wrote on any number of ranks, any other may read on any other number.
"""

from shardopt.checkpoint.export import export_safetensors
from shardopt.checkpoint.folders import latest, read_document
from shardopt.checkpoint.loading import load, load_extras
from shardopt.checkpoint.saving import Saver, save

__all__ = ["Saver", "export_safetensors", "latest", "load", "load_extras", "read_document", "save"]
