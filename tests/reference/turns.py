"""One turn of a conversation as the chat template renders it by itself: an independent view of what `Encoder` marks."""

from hybrid.demo.data.encode import Encoder
from hybrid.demo.data.talk import Conversation


def prompt_of(encoder: Encoder, talk: Conversation, index: int) -> list[int]:
    """The prompt that message `index` answers."""
    return encoder.template.render(talk.messages[:index], talk.tools)


def reply_of(encoder: Encoder, talk: Conversation, index: int) -> list[int]:
    """The tokens the assistant should produce as message `index`, end token included."""
    whole = encoder.template.render(talk.messages[: index + 1], talk.tools, add_generation_prompt=False)
    return whole[len(prompt_of(encoder, talk, index)) :]
