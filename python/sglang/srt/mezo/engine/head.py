"""From hidden states to the scores of chosen tokens, in float32, only where they are needed."""

from collections.abc import Iterator
from typing import Any

import torch

from sglang.srt.mezo.engine.handle import EngineHandle

# Rows whose logits over the vocabulary exist at once; on CPU so few that they stay in the cache.
_MOST_ROWS, _MOST_ROWS_ON_CPU = 1024, 64


class Head:
    """The model's own head: its weight, scale, soft cap and vocabulary-parallel gather; of a masked language model also
    what it makes of hidden states first, and its bias."""

    def __init__(self, handle: EngineHandle):
        model: Any = handle.model_runner.model
        # Some models with tied embeddings have no head beside them.
        head = model.lm_head if hasattr(model, "lm_head") else model.model.embed_tokens
        self._lm_head = getattr(head, "base_layer", head)  # others' adapters may act on it, which is wrapped then
        self._processor = model.logits_processor
        self._transform = getattr(model, "head_hidden", None)
        self._bias: torch.Tensor | None = getattr(model, "head_bias", None)
        self._vocab_size = handle.model_runner.model_config.vocab_size
        self._reads_single_logits = self._is_plain_linear()

    def log_probs(self, hidden: torch.Tensor, rows: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Log-probabilities of single tokens.

        Args:
            hidden: [n, hidden size].
            rows: int64 [reads], the row of ``hidden`` that each read looks at.
            tokens: int64 [reads], the token after it.

        Returns:
            float32 [reads].
        """
        out = torch.empty(rows.numel(), dtype=torch.float32, device=hidden.device)
        needed, row_of_read = rows.unique(return_inverse=True)
        for start, logits in self._parts(hidden, needed):
            log_probs = torch.log_softmax(logits, dim=-1)
            mine = ((row_of_read >= start) & (row_of_read < start + len(logits))).nonzero().squeeze(1)
            out[mine] = log_probs[row_of_read[mine] - start, tokens[mine]]
        return out

    def next_tokens(
        self, hidden: torch.Tensor, rows: torch.Tensor, temperature: float, uniform: torch.Tensor
    ) -> torch.Tensor:
        """The likeliest token, or with a temperature above 0 one that is drawn.

        Args:
            hidden: [n, hidden size].
            rows: int64 [tokens], the row of ``hidden`` that each token follows on.
            uniform: float64 [tokens] on [0, 1), where the drawn token lies among the probabilities in their order.

        Returns:
            int64 [tokens].
        """
        tokens = torch.empty_like(rows)
        for start, logits in self._parts(hidden, rows):
            part = slice(start, start + len(logits))
            if temperature == 0:
                tokens[part] = logits.argmax(dim=-1)
                continue
            ends = torch.softmax(logits.double() / temperature, dim=-1).cumsum(dim=-1)
            drawn = uniform[part].to(ends.device)[:, None] * ends[:, -1:]
            tokens[part] = torch.searchsorted(ends, drawn, right=True).squeeze(1).clamp_(max=self._vocab_size - 1)
        return tokens

    def _parts(self, hidden: torch.Tensor, rows: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
        """Of some rows at a time: the place in ``rows`` of the first, and the logits of all, float32 [some,
        vocabulary]."""
        most = _MOST_ROWS_ON_CPU if hidden.device.type == "cpu" else _MOST_ROWS
        for start in range(0, rows.numel(), most):
            yield start, self._full_logits(hidden.index_select(0, rows[start : start + most])).float()

    def logits(self, hidden: torch.Tensor, rows: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Like ``log_probs`` up to one constant per row: enough where tokens of one row are compared."""
        if not self._reads_single_logits:
            return self.log_probs(hidden, rows, tokens)
        weight = self._lm_head.weight
        states = self._states(hidden, rows)
        logits = torch.linalg.vecdot(states.float(), weight.index_select(0, tokens).float())
        if self._bias is not None:
            logits += self._bias.index_select(0, tokens).float()
        scale = self._processor.logit_scale
        return logits if scale is None else logits * scale

    def _states(self, hidden: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """What the weight is multiplied with, for each read; a row of several is transformed once."""
        if self._transform is None:
            return hidden.index_select(0, rows)
        needed, row_of_read = rows.unique(return_inverse=True)
        return self._transform(hidden.index_select(0, needed)).index_select(0, row_of_read)

    def _full_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        if self._transform is not None:
            hidden = self._transform(hidden)
        # The metadata only serves data-parallel attention and output buffers, which are not in play here.
        logits = self._processor._get_logits(hidden, self._lm_head, logits_metadata=None, use_logits_buffer=False)
        logits = logits[:, : self._vocab_size]
        return logits if self._bias is None else logits + self._bias

    def _is_plain_linear(self) -> bool:
        """Whether a logit is a dot product with a row of a weight that this rank holds whole."""
        from sglang.srt.layers.quantization.unquant import UnquantizedEmbeddingMethod

        return (
            not self._processor.do_tensor_parallel_all_gather
            and self._processor.final_logit_softcapping is None
            and isinstance(getattr(self._lm_head, "quant_method", None), UnquantizedEmbeddingMethod)
            and getattr(self._lm_head, "bias", None) is None
        )
