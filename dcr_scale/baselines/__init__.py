"""Inference-time baselines: Surgical and SCANS, fitted once and applied by hooks (docs/baselines.md).

>>> steering = baselines.load("surgical.safetensors")  # doctest: +SKIP
>>> with steering.applied(model, tokenizer):  # doctest: +SKIP
...     model.generate(**inputs)
"""

from dcr_scale.baselines.steering import Applied, Steering
from dcr_scale.baselines.stored import load

__all__ = ["Applied", "Steering", "load"]
