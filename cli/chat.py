"""`hybrid chat`: a conversation on the terminal, or one answer in a pipe."""

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from cli import options

if TYPE_CHECKING:
    from cli.conversation import Conversation
    from hybrid.engine import Engine


def chat(
    model: options.Model = None,
    system: Annotated[str | None, typer.Option(help="The system prompt.", show_default=False)] = None,
    temperature: options.Temperature = 0.6,
    top_p: options.TopP = 1.0,
    max_tokens: options.MaxTokens = None,
    seed: options.Seed = None,
    plain: Annotated[bool, typer.Option("--plain", help="No colours and no line editor.")] = False,
    no_history: Annotated[
        bool, typer.Option("--no-history", help="Keep no history of what is typed.")
    ] = False,
    device: options.Device = "auto",
    experts: options.Experts = "auto",
    threads: options.Threads = None,
    level: options.Level = None,
    context: options.Context = None,
) -> None:
    """Talk to the model. With stdin piped in: one answer to it, as plain text."""
    from cli.complete import read_stdin
    from cli.conversation import Conversation
    from hybrid.request import SamplingParams
    from offload.errors import TemplateError, UsageError

    params = SamplingParams(temperature, top_p, max_tokens, seed=seed)
    conversation = Conversation(system, params)
    question = None
    if not sys.stdin.isatty():
        question = read_stdin().strip()
        if not question:
            raise UsageError("standard input is empty; pipe a question in, or run this on a terminal")
    with options.loaded_engine(
        model, device=device, experts=experts, threads=threads, context=context, level=level
    ) as engine:
        if engine.template is None:
            raise TemplateError(
                f"{engine.name} has no chat template (a base model?), so it cannot chat; `hybrid complete --raw` "
                "continues text with it"
            )
        if engine.notice:
            typer.echo(engine.notice, err=True)
        if question is None:
            _interactive(engine, conversation, plain=plain, keep_history=not no_history)
        else:
            _one_answer(engine, conversation, question)


def _interactive(engine: "Engine", conversation: "Conversation", *, plain: bool, keep_history: bool) -> None:
    from cli.keys import EditReader, PlainReader, history_file, quiet_keyboard
    from cli.screen import Screen
    from cli.session import Session

    screen = Screen(plain=plain)
    screen.note(f"{engine.name}: /help lists commands, Ctrl-D leaves")
    if plain or not sys.stdout.isatty():
        Session(engine, conversation, screen, PlainReader()).run()
        return
    reader = EditReader(history_file() if keep_history else None, colour=screen.colour)
    with quiet_keyboard():
        Session(engine, conversation, screen, reader).run()


def _one_answer(engine: "Engine", conversation: "Conversation", question: str) -> None:
    from cli.answer import ask
    from cli.screen import PipeScreen, Screen, summary

    conversation.turns.append({"role": "user", "content": question})
    on_terminal = sys.stdout.isatty()
    screen = Screen() if on_terminal else PipeScreen()
    answer = ask(engine, conversation.messages(), conversation.params, screen)
    print()
    typer.echo(summary(engine.stats()["last"], answer.finish_reason), err=True)
