"""One adapter of each variant, small enough for the tests' models, and a few of several at a
time."""

from __future__ import annotations

from kafjax import lora

_FEW = {"rank": 3, "alpha": 6.0, "targets": "(q|o|up|down)_proj"}
_PATTERNS = {"rank_pattern": {"q_proj": 5, "layers/0/mlp": 2}, "alpha_pattern": {"o_proj": 4.0}}
SINGLE = {
    "plain": lora.Spec(**_FEW),
    "rslora": lora.Spec(**_FEW, rslora=True),
    "dora": lora.Spec(**_FEW, dora=True),
    "pissa": lora.Spec(**_FEW, init="pissa"),
    "olora": lora.Spec(**_FEW, init="olora"),
    "dropout": lora.Spec(**_FEW, dropout=0.25),
    "patterns": lora.Spec(**_FEW, **_PATTERNS, layers=(0,)),
    "trained": lora.Spec(**_FEW, trained="norm/scale"),
    "token_rows": lora.Spec(**_FEW, token_rows=(3, 40)),
    "embedding": lora.Spec(rank=3, alpha=6.0, targets="embed|q_proj"),
}
TOGETHER = {
    "pissa, rslora, dropout, rows, patterns": lora.Spec(
        **_FEW, **_PATTERNS, init="pissa", rslora=True, dropout=0.25, token_rows=(3, 40)
    ),
    "olora, dora, extras, embedding": lora.Spec(
        rank=3,
        alpha=6.0,
        targets="embed/|(k|down)_proj",
        init="olora",
        dora=True,
        trained="norm/scale",
    ),
}
