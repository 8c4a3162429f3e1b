"""Model families, declared with Flax NNX and split into plain parameter trees at construction."""

from kafjax.models.config import DecoderConfig, EncoderConfig
from kafjax.models.decoder import Cache, Decoder
from kafjax.models.encoder import Encoder

__all__ = ["Cache", "Decoder", "DecoderConfig", "Encoder", "EncoderConfig"]
