"""What every inference-time baseline has in common: a few vectors in a file, and hooks while they are applied."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from dcr_scale.baselines.residual import backbone, width
from dcr_scale.errors import UserError

# Stands in the metadata of every file; a new one whenever an old reader would misread what is written.
FORMAT = "dcr-steering 1"


class Applied:
    """A steering in force, given by ``with steering.applied(...) as applied``.

    ``model.generate`` needs nothing of it. A generation loop of its own calls :meth:`keep` when it drops or reorders
    rows, and :meth:`decided` around passes that do not begin with the prompt alone. Here, for methods that treat
    all prompts alike, both do nothing.
    """

    def keep(self, rows: Sequence[int] | Tensor) -> None:
        """From now on, row i of a batch is what was row ``rows[i]`` (int indices, or a bool mask [B])."""

    @contextmanager
    def decided(self, input_ids: Tensor, attention_mask: Tensor) -> Iterator[None]:
        """Treat all passes inside as continuations of these left-padded prompts, int64 [B, S], whatever they hold."""
        yield


@dataclass(frozen=True)
class Steering(ABC):
    """Fitted vectors and settings of one method, for one model of ``layers`` layers."""

    method: ClassVar[str]
    layers: int

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """The vectors by name, each of the residual stream's width in its last dimension."""

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """Everything else but ``layers``, for JSON."""

    @classmethod
    @abstractmethod
    def restored(cls, layers: int, tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> Steering:
        """The inverse of :meth:`tensors` and :meth:`settings`. Raises KeyError for what is not there."""

    @abstractmethod
    def _hooked(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> AbstractContextManager[Applied]:
        """Install the hooks."""

    @contextmanager
    def applied(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> Iterator[Applied]:
        """Steer every pass of ``model`` inside the context; its hooks are gone afterwards, whatever happens.

        Args:
            model: a transformers causal language model, plain or in peft, in evaluation mode, with an attention that
                takes padded rows. Under ZeRO-3 every rank enters, and makes the same number of passes.
            tokenizer: the model's own.

        Raises UserError where the vectors were fitted on a model of another shape.
        """
        _, layers = backbone(model)
        own = {tensor.shape[-1] for tensor in self.tensors().values()}
        if self.layers != len(layers) or own != {width(model)}:
            raise UserError(
                f"the {self.method} vectors are for {self.layers} layers of width {', '.join(map(str, sorted(own)))}; "
                f"this model has {len(layers)} of width {width(model)}; fit them on it by launchers/steer.py"
            )
        with self._hooked(model, tokenizer) as applied:
            yield applied

    def save(self, path: str | Path) -> None:
        """Write tensors by name to a safetensors file; its metadata holds format, method and settings as JSON."""
        metadata = {
            "format": FORMAT,
            "method": self.method,
            "layers": str(self.layers),
            "settings": json.dumps(self.settings(), ensure_ascii=False),
        }
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.tensors().items()}
        try:
            save_file(tensors, str(path), metadata)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path}: cannot be written ({error}); give another --out") from None
