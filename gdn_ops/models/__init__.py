"""Floor 4: whole hybrid language models."""

from gdn_ops.models.config import PRESETS, HybridConfig
from gdn_ops.models.hybrid import HybridLM, HybridOutput

__all__ = ["PRESETS", "HybridConfig", "HybridLM", "HybridOutput"]
