"""Conversations as token ids, with the tokens that the assistant has to produce."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from hybrid.chat import ChatTemplate
from hybrid.demo.data.talk import Conversation
from hybrid.tokenizer import Tokenizer
from offload.errors import TemplateError


class Encoded(NamedTuple):
    """One document: uint16 token ids [T]; whether the assistant produces token i, bool [T]."""

    tokens: NDArray[np.uint16]
    produced: NDArray[np.bool_]


class Encoder:
    """Renders conversations through a model directory's own tokenizer and chat template.

    Raises:
        TemplateError: the directory has no chat template.
    """

    def __init__(self, directory: Path) -> None:
        self.tokenizer = Tokenizer.load(directory)
        template = ChatTemplate.load(directory, self.tokenizer)
        if template is None:
            raise TemplateError(
                f"{directory}: no chat template; training renders every conversation through one"
            )
        self.template = template
        special = self.tokenizer.special_ids
        self._assistant, self._middle = special["<|im_assistant|>"], special["<|im_middle|>"]
        self.end = special["<|im_end|>"]

    def encode(self, conversation: Conversation) -> Encoded:
        """The whole conversation. The assistant produces what lies between its header and, inclusive, its end
        token; callers' text cannot spell either, so looking for them is exact."""
        ids = self.template.render(conversation.messages, conversation.tools, add_generation_prompt=False)
        tokens = np.array(ids, dtype=np.uint16)
        produced = np.zeros(len(ids), dtype=np.bool_)
        header = start = -1
        for i, token in enumerate(ids):
            if token == self._assistant:
                header = i
            elif token == self._middle and header >= 0:
                start = i + 1
            elif token == self.end and header >= 0:
                produced[start : i + 1] = True
                header = -1
        return Encoded(tokens, produced)
