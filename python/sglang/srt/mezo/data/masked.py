"""From rows to tokenised examples of a masked language model: words in the place of a mask."""

from collections.abc import Mapping, Sequence
from typing import Any

from sglang.srt.mezo.core.errors import DataError, shown
from sglang.srt.mezo.data.checks import require_choice, require_distinct
from sglang.srt.mezo.data.examples import Encoder, Example
from sglang.srt.mezo.data.tasks import Piece, Task, TextExample
from sglang.srt.mezo.data.texts import Encoding, Texts


class MaskedEncoder(Encoder):
    """Rows are a task's columns, or ``{"prompt", "options", "label"}`` with the tokenizer's mask in the prompt."""

    _forms = (({"prompt", "options", "label"}, Encoder._encode_options),)
    _forms_of = ", which is what a masked language model can be asked"

    @property
    def _mask(self) -> str:
        mask: Any = self.tokenizer.mask_token
        if mask is None:
            raise DataError("the tokenizer of this model has no mask token")
        return mask

    def _encode_row(
        self, task: Task, fields: Mapping[str, Any], demonstrations: Sequence[str] = ()
    ) -> Encoding[Example]:
        """The pieces around the mask, each tokenised by itself and cut where it says, between the model's first token
        and its last; what is then too long loses its end."""
        if demonstrations:
            raise DataError("a masked language model is shown no demonstrations")
        text = task.render_masked(fields)
        require_choice(text.options, text.label)
        texts, limits = zip(*(_limited(piece) for piece in (*text.before, *text.after)))
        tokens = yield Texts(texts, special_tokens=False)
        pieces = [ids[:limit] for ids, limit in zip(tokens, limits)]
        before, after = (sum(part, []) for part in (pieces[: len(text.before)], pieces[len(text.before) :]))
        ends: Any = self.tokenizer.cls_token_id, self.tokenizer.sep_token_id
        mask: Any = self.tokenizer.convert_tokens_to_ids(self._mask)
        whole = [ends[0], *before, mask, *after, ends[1]]
        kept = whole[: min(self.max_length, task.masked_length or self.max_length)]
        self._cut += len(kept) < len(whole) or pieces != tokens
        return (yield from self._encode_words(kept, text.options, text.label))

    def _encode_text(self, text: TextExample, cut_to: int | None = None) -> Encoding[Example]:
        require_choice(text.options, text.label)
        [prompt] = yield Texts([text.prompt])
        return (yield from self._encode_words(prompt, text.options, text.label))

    def _encode_words(self, prompt: Sequence[int], options: Sequence[str], label: int) -> Encoding[Example]:
        """Raises DataError where the prompt has not one mask, or an option is not one token."""
        mask = self.tokenizer.convert_tokens_to_ids(self._mask)
        places = [place for place, token in enumerate(prompt) if token == mask]
        if len(places) != 1:
            raise DataError(f"the prompt has {len(places)} {self._mask}, and one is needed, where the options stand")
        words = yield Texts(options, special_tokens=False)
        for place, (option, word) in enumerate(zip(options, words)):
            if len(word) != 1 or word[0] == self.tokenizer.unk_token_id:
                found = f"{len(word)} tokens" if len(word) != 1 else "not a word of the model's"
                raise DataError(
                    f"options[{place}]={shown(option)} is {found}, and one stands in the place of {self._mask}: mostly "
                    "a word with the space before it"
                )
        require_distinct(options, list(map(tuple, words)))
        return self._checked(Example(tuple(prompt), tuple(map(tuple, words)), label, places[0]))


def _limited(piece: Piece) -> tuple[str, int | None]:
    return (piece, None) if isinstance(piece, str) else piece
