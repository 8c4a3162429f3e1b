"""Model families, declared with Flax NNX and split into plain parameter trees at construction."""

from kafjax.models import caches
from kafjax.models.caches import Cache
from kafjax.models.config import DecoderConfig, EncoderConfig
from kafjax.models.cross_encoder import CrossEncoder
from kafjax.models.decoder import Decoder
from kafjax.models.encoder import Encoder
from kafjax.models.remat import REMAT
from kafjax.models.shapes import CONFIGS, named

__all__ = [
    "CONFIGS",
    "REMAT",
    "Cache",
    "CrossEncoder",
    "Decoder",
    "DecoderConfig",
    "Encoder",
    "EncoderConfig",
    "caches",
    "named",
]
