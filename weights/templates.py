"""Chat templates: for a model that has none, and where an answer stands in one.

`--chat-template` gives one to a model which has none, as base models have.

`plain` is data/plain.jinja: the system text, "Question: ...", and "Answer:" as the cue. A question
that ends with that cue (`--prompt few-shot`) is taken as it is.

A base model ends no turn. After its answer it writes the next question. So a template may name stop
strings, in a comment: {# stop: ["\\nQuestion:"] #}. They are a part of the template, so a saved
model has them too. What ends at one is a whole completion. The loss keeps the string's tokens, as
it keeps EOS, and so teaches where to end. Who reads the text, the reward too, does not see it.

Left out: guessing a template from a model's name.
"""

import json
import re
from pathlib import Path

from jinja2 import TemplateError, TemplateSyntaxError

from common.command import note, one_line

PLAIN = Path(__file__).resolve().parents[1] / "data" / "plain.jinja"
NAMES_STOPS = re.compile(r"\{#(?:(?!#\}).)*?\bstops?\s*:.*?#\}", re.S)    # a comment
STOPS = re.compile(r"\bstop:\s*(\[.*\])\s*-?#\}", re.S)


class Broken(ValueError):
    """A chat template that cannot be used, in one line."""


def read(given: str) -> str:
    """The text of a template: of `plain` its name, of a file what is in it. A text stays as it is,
    which is what a resumed run gives. Raises ValueError in one line."""
    if given == "plain" or "{{" in given or "{%" in given:
        return given
    path = Path(given)
    if not path.is_file():
        raise ValueError(f"no file {given[:200]}: --chat-template takes plain, or a file with a "
                         "Jinja template")
    try:
        text = path.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{given} is no chat template: it is not UTF-8") from error
    if "{{" not in text:
        raise ValueError(f"{given} is no chat template: it has no {{{{ }}}} that would show what "
                         "is asked")
    return text


def give(tokenizer, text: str) -> None:
    """Sets the template, a text or `plain`. Raises Broken for what is no Jinja."""
    own = tokenizer.bos_token_id
    begins = own is not None and own in tokenizer("Hello").input_ids[:1]
    if text == "plain":
        text = PLAIN.read_text(encoding="utf-8")
        if not begins:                                  # as the model's own texts did
            text = text.replace("{{- bos_token }}\n", "")
    elif begins and not any(bos in text for bos in ("bos_token", tokenizer.bos_token)):
        note(f"warning: the chat template has no {tokenizer.bos_token}, which this model's texts "
             "begin with: {{ bos_token }} puts it there")
    tokenizer.chat_template = text
    try:
        tokenizer.apply_chat_template(CHAT[:1], tokenize=False)
    except TemplateSyntaxError as error:
        raise Broken(f"the chat template cannot render a chat: {one_line(error)}") from error
    except (TemplateError, TypeError):                  # it refuses this one, maybe no other
        pass


def stop_strings(tokenizer) -> tuple[str, ...]:
    """The stop strings that the tokenizer's chat template names. Raises Broken for a comment that
    cannot be read as such, or a second one."""
    template = getattr(tokenizer, "chat_template", None)
    named = NAMES_STOPS.findall(template) if isinstance(template, str) else []
    try:
        stops = [stop for comment in named for stop in json.loads(STOPS.search(comment)[1])]
    except (ValueError, TypeError):
        stops = [None]
    if len(named) > 1 or not all(isinstance(stop, str) and stop for stop in stops):
        told = " ".join(" ".join(named).split())
        raise Broken(f"the chat template's stop strings {told} are no JSON list of texts: write "
                     'one comment, such as {# stop: ["\\nQuestion:"] #}')
    return tuple(stops)


# --------------------------------------------------------------------------------------------------
# Where an answer stands, and what ends it

CHAT = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "xyzzy"}]


def prompt(tokenizer) -> str:
    """The chat up to where its answer begins; "" where the template is missing or refuses it."""
    try:
        return tokenizer.apply_chat_template(CHAT[:1], tokenize=False, add_generation_prompt=True,
                                             enable_thinking=False)
    except (ValueError, TypeError, TemplateError):
        return ""


def texts_around_answer(tokenizer) -> tuple[str, str]:
    """What the chat template puts before and behind an answer; "" where it is missing or refuses
    one."""
    try:
        text = tokenizer.apply_chat_template(CHAT, tokenize=False, enable_thinking=False)
    except (ValueError, TypeError, TemplateError):
        return "", ""
    before, _, after = text.partition(CHAT[1]["content"])
    return before, after


def around_answer(tokenizer) -> tuple[list[int], list[int]]:
    """The same as token ids."""
    return tuple(tokenizer(text, add_special_tokens=False).input_ids
                 for text in texts_around_answer(tokenizer))


def thinks(tokenizer) -> bool:
    """Whether the chat template opens a thought before the answer, though it is asked not to."""
    return prompt(tokenizer).rstrip().endswith("<think>")


def template_end(tokenizer) -> list[int]:
    """The first token of its own, not of text, that the chat template puts behind an answer."""
    after = around_answer(tokenizer)[1]
    return [i for i in after if i in tokenizer.added_tokens_decoder][:1]


def turn_end(tokenizer, stop_ids: list[int]) -> int:
    """The stop id that the chat template closes an answer with; the tokenizer's EOS if it has none.

    Raises ValueError where neither is among `stop_ids`.
    """
    for token in [*around_answer(tokenizer)[1], tokenizer.eos_token_id]:
        if token in stop_ids:
            return token
    raise ValueError("neither the chat template's end of a turn nor the tokenizer's EOS stops this "
                     "model: use one whose generation config names it")


def answer_lead(tokenizer) -> str:
    """The blank that the template puts between a prompt and its answer; "" where it puts none, or
    refuses an answer."""
    asked, (before, _) = prompt(tokenizer), texts_around_answer(tokenizer)
    lead = before.removeprefix(asked)
    return lead if asked and before.startswith(asked) and lead.isspace() else ""
