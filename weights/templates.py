"""The chat template that `--chat-template` gives a model which has none, as base models have.

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

from common.command import note

PLAIN = Path(__file__).resolve().parents[1] / "data" / "plain.jinja"
STOPS = re.compile(r"\{#(?:(?!#\}).)*?\bstop:\s*(\[.*?\])\s*-?#\}", re.S)


def read(given: str) -> str:
    """The text of a template: of `plain` its name, of a file what is in it. A text stays as it is,
    which is what a resumed run gives. Raises ValueError in one line."""
    if given == "plain" or "{{" in given or "{%" in given:
        return given
    path = Path(given)
    if not path.is_file():
        raise ValueError(f"no file {given[:200]}: --chat-template takes plain, or a file with a "
                         "Jinja template")
    text = path.read_bytes().decode("utf-8", "replace")
    if "{{" not in text:
        raise ValueError(f"{given} is no chat template: it has no {{{{ }}}} that would show what "
                         "is asked")
    return text


def give(tokenizer, given: str) -> None:
    """Sets the template that `read` takes. Raises ValueError where its stop strings are none."""
    own = tokenizer.bos_token_id
    begins = own is not None and own in tokenizer("Hello").input_ids[:1]
    text = read(given)
    if text == "plain":
        text = PLAIN.read_text(encoding="utf-8")
        if not begins:                                  # as the model's own texts did
            text = text.replace("{{- bos_token }}\n", "")
    elif begins and not any(bos in text for bos in ("bos_token", tokenizer.bos_token)):
        note(f"warning: the chat template has no {tokenizer.bos_token}, which this model's texts "
             "begin with: {{ bos_token }} puts it there")
    tokenizer.chat_template = text
    stop_strings(tokenizer)


def stop_strings(tokenizer) -> tuple[str, ...]:
    """The stop strings that the tokenizer's chat template names."""
    template = getattr(tokenizer, "chat_template", None)
    found = STOPS.search(template) if isinstance(template, str) else None
    if not found:
        return ()
    try:
        stops = json.loads(found[1])
    except ValueError:
        stops = [None]
    if not all(isinstance(stop, str) and stop for stop in stops):
        raise ValueError(f"the chat template's stop strings {found[1]} are no JSON list of texts: "
                         'write {# stop: ["\\nQuestion:"] #}')
    return tuple(stops)


def answer_lead(tokenizer) -> str:
    """The blank that the template puts between a prompt and its answer; "" where it puts none."""
    chat = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "xyzzy"}]
    prompt = tokenizer.apply_chat_template(chat[:1], tokenize=False, add_generation_prompt=True,
                                           enable_thinking=False)
    text = tokenizer.apply_chat_template(chat, tokenize=False, enable_thinking=False)
    lead = text.removeprefix(prompt).partition("xyzzy")[0]
    return lead if text.startswith(prompt) and lead.isspace() else ""
