"""A tokenizer of words, an adapter and texts for tests of trainers."""

from peft import LoraConfig
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from tiny_models import VOCABULARY, make_ids

LORA = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")

TEMPLATE = (
    "{% for m in messages %}<s> {{ m['role'] }} {% if m['role'] == 'assistant' %}{% generation %} "
    "{{ m['content'] }} </s> {% endgeneration %}{% else %}{{ m['content'] }} </s> {% endif %}"
    "{% endfor %}"
)


def tokenizer():
    words = ["<pad>", "<s>", "</s>", *(f"w{i}" for i in range(VOCABULARY - 3))]
    model = WordLevel({word: i for i, word in enumerate(words)}, unk_token="w0")
    backend = Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        chat_template=TEMPLATE,
    )


def words(count, seed):
    return " ".join(f"w{i - 3}" for i in make_ids(1, count, seed)[0].tolist())
