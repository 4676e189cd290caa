"""Chat templates after the documented formats of models, and what they make of answers."""

from typing import NamedTuple

from tiny import tiny_tokenizer


class Format(NamedTuple):
    """One of them.

    Attributes:
        template: of Jinja.
        answer: what is generated where the assistant says "{}".
        strict: whether roles have to alternate, with none of the system.
    """

    template: str
    answer: str
    strict: bool = False


def _each(body, begin="{{ bos_token }}", header=""):
    """Writes `body` for each message `m`, and the header of an answer to come."""
    header = f"{{% if add_generation_prompt %}}{{{{ {header!r} }}}}{{% endif %}}"
    return f"{begin}{{% for m in messages %}}{body}{{% endfor %}}{header}"


def _by_role(user, assistant, others="raise_exception('no system')"):
    """Writes one of three expressions."""
    return (
        f"{{% if m.role == 'user' %}}{{{{ {user} }}}}"
        f"{{% elif m.role == 'assistant' %}}{{{{ {assistant} }}}}"
        f"{{% else %}}{{{{ {others} }}}}{{% endif %}}"
    )


_TURNS = (
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
)
_CHATML = "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
_NO_SYSTEM = "{% if messages[0].role != 'system' %}"
_GEMMA = "'<start_of_turn>%s\n' + m.content | trim + '<end_of_turn>\n'"
_LLAMA3 = (
    "{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim"
    " + '<|eot_id|>' }}"
)
_COMMAND = "'<|START_OF_TURN_TOKEN|><|%s_TOKEN|>' + m.content.strip() + '<|END_OF_TURN_TOKEN|>'"
# Tools stand before the last question, and nothing says that an answer comes.
_MISTRAL = (
    "{{ bos_token }}{% set users = messages | selectattr('role', 'equalto', 'user') | list %}"
    "{% for m in messages %}{% if m.role == 'user' %}{% if tools and m == users[-1] %}"
    "{{ '[AVAILABLE_TOOLS]' + s + tools | tojson + '[/AVAILABLE_TOOLS]' }}{% endif %}"
    "{{ '[INST]' + s + m.content + '[/INST]' }}"
    "{% elif m.tool_calls %}{{ '[TOOL_CALLS]' + s + '[' }}{% for c in m.tool_calls %}"
    "{{ c.function | tojson + ('' if loop.last else ', ') }}{% endfor %}{{ ']' + eos_token }}"
    "{% elif m.role == 'assistant' %}{{ s + m.content | trim + eos_token }}"
    "{% elif m.role == 'tool' %}{{ '[TOOL_RESULTS]' + s + m.content + '[/TOOL_RESULTS]' }}"
    "{% else %}{{ raise_exception('no system') }}{% endif %}{% endfor %}"
)

FORMATS = {
    "chatml": Format(_each(_CHATML, "", "<|im_start|>assistant\n"), "{}<|im_end|>"),
    "smollm2": Format(
        _each(
            _CHATML,
            _NO_SYSTEM + "{{ '<|im_start|>system\nYou help.<|im_end|>\n' }}{% endif %}",
            "<|im_start|>assistant\n",
        ),
        "{}<|im_end|>",
    ),
    # With marks, and the date.
    "smollm3": Format(
        _each(
            "{% if m.role == 'assistant' %}{{ '<|im_start|>assistant\n' }}{% generation %}"
            "{{ m.content + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
            "{% else %}" + _CHATML + "{% endif %}",
            _NO_SYSTEM + "{{ 'Today: ' + strftime_now('%d %B %Y') }}{% endif %}",
            "<|im_start|>assistant\n",
        ),
        "{}<|im_end|>",
    ),
    "phi4": Format(
        _each(
            "{{ '<|im_start|>' + m.role + '<|im_sep|>' + m.content + '<|im_end|>' }}",
            "",
            "<|im_start|>assistant<|im_sep|>",
        ),
        "{}<|im_end|>",
    ),
    "llama2": Format(
        _each(
            _TURNS
            + _by_role(
                "bos_token + '[INST] ' + m.content | trim + ' [/INST]'",
                "' ' + m.content | trim + ' ' + eos_token",
            ),
            "",
        ),
        " {} </s>",
        strict=True,
    ),
    "llama3": Format(
        _each(_LLAMA3, header="<|start_header_id|>assistant<|end_header_id|>\n\n"), "{}<|eot_id|>"
    ),
    "mistral1": Format(
        _each(_TURNS + _by_role("'[INST] ' + m.content + ' [/INST]'", "m.content + eos_token")),
        "{}</s>",
        strict=True,
    ),
    "mistral3": Format("{% set s = ' ' %}" + _MISTRAL, " {}</s>", strict=True),
    "nemo": Format("{% set s = '' %}" + _MISTRAL, "{}</s>", strict=True),
    "gemma": Format(
        _each(
            _TURNS + _by_role(_GEMMA % "user", _GEMMA % "model"), header="<start_of_turn>model\n"
        ),
        "{}<end_of_turn>",
        strict=True,
    ),
    "command-r": Format(
        _each(
            _by_role(_COMMAND % "USER", _COMMAND % "CHATBOT", _COMMAND % "SYSTEM"),
            header="<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>",
        ),
        "{}<|END_OF_TURN_TOKEN|>",
    ),
    # All messages of the system stand in front.
    "deepseek": Format(
        _each(
            _by_role(
                "'<｜User｜>' + m.content",
                "'<｜Assistant｜>' + m.content.split('</think>')[-1] + '<｜end▁of▁sentence｜>'",
                "''",
            ),
            "{{ bos_token }}{% for m in messages if m.role == 'system' %}{{ m.content }}"
            "{% endfor %}",
            "<｜Assistant｜><think>\n",
        ),
        "{}<｜end▁of▁sentence｜>",
    ),
    # The last message has no line break behind it.
    "olmo2": Format(
        _each(
            _by_role(
                "'<|user|>\n' + m.content + '\n'",
                "'<|assistant|>\n' + m.content + eos_token + ('' if loop.last else '\n')",
                "'<|system|>\n' + m.content + '\n'",
            ),
            header="<|assistant|>\n",
        ),
        "{}</s>",
    ),
    "vicuna": Format(
        _each(
            _by_role(
                "'USER: ' + m.content + ' '",
                "'ASSISTANT: ' + m.content + eos_token",
                "m.content + ' '",
            ),
            header="ASSISTANT:",
        ),
        " {}</s>",
    ),
}
_SPECIAL = [
    *("<|im_start|>", "<|im_end|>", "<|im_sep|>", "<|user|>", "<|assistant|>", "<|system|>"),
    *("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<start_of_turn>", "<end_of_turn>"),
    *("<|START_OF_TURN_TOKEN|>", "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>", "<|END_OF_TURN_TOKEN|>"),
    *("<｜User｜>", "<｜Assistant｜>", "<｜end▁of▁sentence｜>", "[INST]", "[/INST]"),
]


def with_format(name):
    """A tokenizer with this template, and with the special tokens of all."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"eos_token": "</s>", "additional_special_tokens": _SPECIAL})
    tokenizer.chat_template = FORMATS[name].template
    return tokenizer
