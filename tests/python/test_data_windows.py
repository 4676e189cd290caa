"""Token windows: what they hold, how they cover documents, pure functions of their index."""

import itertools
import json

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from lemo.data import Document, first_windows, open_training_data, token_windows
from lemo.data.check import check_file
from tiny import sample_text, tiny_tokenizer

# Token ids, made on the CPU.
pytestmark = pytest.mark.cpu_only


def merging_tokenizer(bos: bool, text: str = sample_text(500, 0)) -> PreTrainedTokenizerFast:
    """A byte-level BPE with merges, optionally with a template that puts ``<s>`` in front."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=290,
        special_tokens=["<s>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text], trainer)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 0)]
        )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>")


def documents(*words: int) -> list[Document]:
    return [Document(str(i), "text", sample_text(n, i)) for i, n in enumerate(words)]


@pytest.mark.parametrize("bos", [False, True])
def test_first_windows_are_the_head_of_the_whole_encoding(bos):
    tokenizer = merging_tokenizer(bos)
    source = documents(400, 10, 90)
    windows, short = first_windows(source, tokenizer, 100)
    assert short == 1
    assert [document.id for document, _ in windows] == ["0", "2"]
    for document, ids in windows:
        assert ids.tolist() == tokenizer(document.text)["input_ids"][:100]


def test_texts_begin_once():
    """Texts may have the begin that the tokenizer puts in front of them already."""
    tokenizer = merging_tokenizer(True)
    [plain] = documents(60)
    begun = Document(plain.id, plain.kind, "<s>" + plain.text)
    length = len(tokenizer(plain.text)["input_ids"])
    for source in (plain, begun):
        [(_, ids)], _ = first_windows([source], tokenizer, length)
        assert ids.tolist() == tokenizer(plain.text)["input_ids"]
        assert token_windows([source], tokenizer, length).window(0).tolist() == ids.tolist()


def test_a_text_cut_within_a_word_changes_no_token():
    # The encoder reads 5 characters for each token first, which ends within the tenth word here.
    text = "bbbbbbbbb" + " aaaa" * 50
    tokenizer = merging_tokenizer(False, text)
    ids = tokenizer(text)["input_ids"]
    assert len(ids) == 51
    windows, _ = first_windows([Document("0", "text", text)], tokenizer, 10)
    assert windows[0][1].tolist() == ids[:10]


@pytest.mark.parametrize("bos", [False, True])
def test_windows_are_pieces_of_the_documents(bos):
    tokenizer = merging_tokenizer(bos)
    source = documents(400, 90)
    windows = token_windows(source, tokenizer, 64)
    texts = [document.text for document in source]
    for i in range(50):
        ids = windows.window(i)
        assert ids.shape == (64,)
        assert ids.dtype == torch.int64
        assert (ids[0].item() == 0) is bos
        assert any(tokenizer.decode(ids[bos:]) in text for text in texts)


def test_every_window_is_a_pure_function_of_its_index():
    source = documents(300, 300)
    first = token_windows(source, tiny_tokenizer(), 32, seed=3)
    second = token_windows(iter(source), tiny_tokenizer(), 32, seed=3)
    second.window(17)
    assert torch.equal(first.batch(4, 5), torch.stack([second.window(i) for i in range(4, 9)]))
    assert torch.equal(next(iter(first)), second.window(0))
    other = token_windows(source, tiny_tokenizer(), 32, seed=4)
    assert not torch.equal(first.batch(0, 4), other.batch(0, 4))


def test_windows_cover_the_documents_evenly():
    # 10,000 characters in all; with 200 windows of 100 tokens every token is met some 2 times.
    text = "".join(f"{i:04d} " for i in range(2000))
    source = [Document("0", "text", text[:2500]), Document("1", "text", text[2500:])]
    windows = token_windows(source, tiny_tokenizer(), 100)
    starts = sorted(int(tiny_tokenizer().decode(windows.window(i))[1:5]) for i in range(200))
    assert starts[0] < 40
    assert max(b - a for a, b in itertools.pairwise(starts)) < 50
    assert 35 <= sum(start < 500 for start in starts) <= 65


def test_every_start_in_a_short_document_is_as_likely():
    """Also where few windows fit: none is taken for all places behind the last of them."""
    text = "".join(f"{i:04d} " for i in range(300))
    windows = token_windows([Document("0", "text", text)], tiny_tokenizer(), 1000)
    starts = [tiny_tokenizer().decode(windows.window(i))[:5] for i in range(100)]
    # 40 words to begin with.
    assert max(starts.count(start) for start in starts) <= 5


def test_windows_begin_between_words():
    words = [f"{i:04d}" + "x" * 46 for i in range(100)]
    windows = token_windows([Document("0", "text", " ".join(words))], tiny_tokenizer(), 100)
    begun = [tiny_tokenizer().decode(windows.window(i))[0] == " " for i in range(100)]
    # But for the last ones, which are moved back to be whole.
    assert sum(begun) >= 95
    short = token_windows([Document("0", "text", "ab cd ef gh i")], tiny_tokenizer(), 10)
    assert {tiny_tokenizer().decode(short.window(i)) for i in range(20)} == {
        "ab cd ef g",
        " cd ef gh ",
    }


def test_a_document_of_exactly_one_window():
    source = [Document("0", "text", "abcdefgh")]
    windows = token_windows(source, tiny_tokenizer(), 8)
    assert all(tiny_tokenizer().decode(windows.window(i)) == "abcdefgh" for i in range(5))


def test_uneven_text_still_fills_the_window():
    # The first half has one character a token, the second four bytes, so places are misjudged.
    source = [Document("0", "text", "a" * 300 + "\N{GRINNING FACE}" * 100)]
    windows = token_windows(source, tiny_tokenizer(), 64)
    assert windows.batch(0, 40).shape == (40, 64)
    reverse = [Document("0", "text", "\N{GRINNING FACE}" * 100 + "a" * 70)]
    found = token_windows(reverse, tiny_tokenizer(), 300).batch(0, 40)
    assert found.shape == (40, 300)
    # Where fewer follow it is the last ones.
    assert any(tiny_tokenizer().decode(ids).endswith("a" * 70) for ids in found)


def odd_document(spaces: str) -> Document:
    """600 words of a letter, then runs of spaces that are single tokens: 1213 tokens, not 25600."""
    return Document("odd", "text", "a b c " * 200 + spaces * 400)


def test_a_document_whose_length_was_misjudged_is_left_out(caplog):
    spaces = " " * 64
    tokenizer = merging_tokenizer(False, " ".join([spaces] * 50))
    with pytest.raises(ValueError, match="at least one of 2000 tokens.*all 1 documents are sh"):
        token_windows([odd_document(spaces)], tokenizer, 2000).window(0)
    caplog.clear()
    source = [odd_document(spaces), *documents(3000, 3000)]
    windows = token_windows(source, tokenizer, 2000)
    found = windows.batch(0, 20)
    assert caplog.text.count("'odd' has 1213 tokens, fewer than 2000, although") == 1
    # The same ones for another process, which has not met the document yet.
    for index in (19, 3, 11):
        assert torch.equal(token_windows(source, tokenizer, 2000).window(index), found[index])
    # Both of the others take its part.
    text = [tokenizer.decode(ids) for ids in found]
    shares = [sum(piece in document.text for piece in text) for document in source]
    assert shares[0] == 0
    assert min(shares[1:]) >= 6


def with_token(text: str):
    """`merging_tokenizer` with an added token, whose id is the 291st, and a document of `text`."""
    tokenizer = merging_tokenizer(True)
    size = len(tokenizer)
    tokenizer.add_tokens(["<new>"])
    return tokenizer, size, [Document("odd", "text", text)]


def test_ids_without_an_embedding_are_refused_at_the_start():
    tokenizer, size, source = with_token(sample_text(300, 0))
    for cut in (token_windows, first_windows):
        with pytest.raises(ValueError, match=rf"below {size - 9}, .* but 9 of its tokens are beyo"):
            cut(source, tokenizer, 32, vocab_size=size - 9)
        with pytest.raises(ValueError, match=r"below 0, .* tokens are beyond: .* more; the token"):
            cut(source, tokenizer, 32, vocab_size=0)


def test_a_begin_without_an_embedding_is_refused_at_the_start():
    """No text has it in it."""
    tokenizer, size, source = with_token(sample_text(300, 0))
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<new> $A", special_tokens=[("<new>", size)]
    )
    for cut in (token_windows, first_windows):
        with pytest.raises(ValueError, match=f"below {size}, .* 1 of its tokens are beyond: <new>"):
            cut(source, tokenizer, 32, vocab_size=size)
        cut(source, tokenizer, 32, vocab_size=size + 1)


@pytest.mark.parametrize("record", [{"text": "a <new>"}, {"prompt": "a ", "completion": "<new>"}])
def test_files_are_checked_for_tokens_without_an_embedding(tmp_path, record):
    tokenizer, size, _ = with_token("")
    (tmp_path / "d.jsonl").write_text(json.dumps(record))
    open_training_data(tmp_path / "d.jsonl", tokenizer, 3, vocab_size=size + 1)
    with pytest.raises(ValueError, match=rf"the token '<new>' with the id {size}, but the model's"):
        open_training_data(tmp_path / "d.jsonl", tokenizer, 3, vocab_size=size)


@pytest.mark.parametrize("begin", ["", "<s>"])
def test_documents_are_counted_as_they_are_read(tmp_path, begin):
    """With one begin, and as long enough where they have as many tokens as a window."""
    tokenizer = merging_tokenizer(True)
    (tmp_path / "d.txt").write_text(begin + sample_text(20, 0))
    tokens = len(tokenizer(sample_text(20, 0))["input_ids"])
    for length, short in ((tokens, 0), (tokens + 1, 1)):
        found = check_file(tmp_path / "d.txt", tokenizer, length)
        assert dict(found.rows)["tokens"] == str(tokens)
        assert found.remarks[0].startswith(f"{short} of 1 documents are shorter")


def test_an_added_token_without_an_embedding_is_refused_where_a_text_has_it():
    tokenizer, size, source = with_token(sample_text(300, 0))
    expected = token_windows(source, tokenizer, 32).batch(0, 5)
    assert torch.equal(token_windows(source, tokenizer, 32, vocab_size=size).batch(0, 5), expected)
    tokenizer, size, source = with_token("<new> " + sample_text(300, 0))
    for cut in (token_windows, first_windows):
        with pytest.raises(ValueError, match=rf"'odd' has the token '<new>' with the id {size}, "):
            cut(source, tokenizer, 32, vocab_size=size)
        cut(source, tokenizer, 32, vocab_size=size + 1)


def test_a_tokenizer_that_names_no_vocabulary_is_checked_window_by_window():
    tokenizer = merging_tokenizer(True)

    def plain(text, **arguments):
        return tokenizer(text, **arguments)

    windows = token_windows(documents(300), plain, 32, vocab_size=20)
    with pytest.raises(
        ValueError, match=r"'0' has the id \d+, but the model's embedding ends at 20"
    ):
        windows.window(0)


def test_short_documents_are_counted():
    windows = token_windows(documents(300, 2, 3), tiny_tokenizer(), 64)
    assert (windows.used, windows.too_short) == (1, 2)


@pytest.mark.parametrize("cut", [token_windows, first_windows])
def test_no_document_is_long_enough(cut):
    with pytest.raises(ValueError, match="at least one of 5000 tokens.*all 2 documents are sh"):
        cut(documents(3, 4), tiny_tokenizer(), 5000)


@pytest.mark.parametrize("length", [1, 2.5, "8"])
def test_length_is_checked(length):
    with pytest.raises(ValueError, match="length: expected an integer >= 2"):
        token_windows(documents(30), tiny_tokenizer(), length)


def test_fingerprint_tells_documents_and_length_apart():
    def fingerprint(source, length):
        return token_windows(source, tiny_tokenizer(), length).fingerprint

    assert fingerprint(documents(50), 32) == fingerprint(documents(50), 32)
    assert fingerprint(documents(50), 32) != fingerprint(documents(51), 32)
    assert fingerprint(documents(50), 32) != fingerprint(documents(50), 33)


def test_any_tokenizer_of_transformers_will_do():
    """Also one that is not made of `tokenizers`."""
    tokenizer = merging_tokenizer(True)

    def plain(text, **arguments):
        return tokenizer(text, **arguments)

    source = documents(400, 90)
    expected = token_windows(source, tokenizer, 64).batch(0, 5)
    assert torch.equal(token_windows(source, plain, 64).batch(0, 5), expected)


def test_windows_do_not_depend_on_what_else_the_tokenizer_was_asked():
    tokenizer = merging_tokenizer(True)
    tokenizer.pad_token = "<s>"
    windows = token_windows(documents(400, 90), tokenizer, 64)
    expected = windows.batch(0, 5)
    tokenizer("a b c d e f g", truncation=True, max_length=4)
    assert torch.equal(windows.batch(0, 5), expected)
    tokenizer(["a b c", "a"], padding="max_length", max_length=2000, padding_side="left")
    assert torch.equal(windows.batch(0, 5), expected)
